"""Several commands in one program: a file of them, and how they follow one another. docs/runs.md shows one."""
