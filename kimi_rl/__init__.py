"""kimi_rl: reinforcement-learning post-training for the Kimi Linear hybrid.

Data flows through the package in this order::

    recipe -> dataset -> rollout -> rewards -> learner -> weight_sync -> mismatch -> evaluate -> report
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout (or an editable install) `rewards/` and `kernels/` lie beside this folder; in a wheel they lie
# inside it. Extending the search path makes `kimi_rl.rewards` and `kimi_rl.kernels` the same modules either way.
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "dispatch.py").is_file() and not (_root / "kimi_rl" / "kernels").exists():
    __path__.append(str(_root))
del _root, Path
