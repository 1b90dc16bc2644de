"""Measurements behind `kimi-rl bench`: each gives a dictionary of figures, with versions and device beside them."""
