"""What this machine, or this cluster, has for a run, and what it lacks, in words."""
