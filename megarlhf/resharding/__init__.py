"""Weights from one parallel layout to another: a pure plan, its execution, and publishing policy weights to the generator."""
