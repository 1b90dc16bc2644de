"""Problems to train on and to evaluate on: procedural tasks, local files, hub data sets."""

from kimi_rl.dataset.load import Problems, load_problems

__all__ = ["Problems", "load_problems"]
