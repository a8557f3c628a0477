"""What is made before a run: configurations, tokenizers, corpora; each module is a command."""
