"""One model under a schedule: what is neither the model nor the algorithm."""
