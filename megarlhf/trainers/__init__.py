"""The stages of InstructGPT: pretraining, supervised fine-tuning, reward model, PPO-ptx; one iteration on one screen each."""
