"""Other projects' models in and out: families as tables of names, and their configurations as architectures; no model is built."""
