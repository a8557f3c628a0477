"""Text in: tokenizers, validated records, token rows, orders without replacement, the pretraining stream, collation."""
