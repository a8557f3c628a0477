"""Transformers under tensor, sequence and pipeline parallelism: language models and scalar-headed reward and value models."""
