"""What a run needs and how long it takes, before it is started: the program itself, run on tensors without values."""
