"""The Python API: a function for each stage, and what it leaves; `megarlhf.ppo` is `stages.ppo`. docs/api.md shows all."""
