"""The mathematics of RLHF: functions of tensors, nothing else."""
