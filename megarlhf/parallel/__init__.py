"""Where a model's pieces live: platform, layouts, process groups, collectives and vocabulary-parallel log-probabilities."""
