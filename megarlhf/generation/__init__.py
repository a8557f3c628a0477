"""Sampling responses inside the trainer, from the trainer's own weights and layouts."""
