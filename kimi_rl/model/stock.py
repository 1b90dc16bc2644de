"""transformers' own Kimi Linear, as `hf`, without FLA where there is no card.

transformers takes FLA's kernels as soon as `fla` is installed: on a machine without a card they cannot run, fail on CPU
tensors, and importing them takes seconds in every process.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def not_importable(package: str) -> Iterator[None]:
    """Meanwhile `import package` fails, unless it has been imported before."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None
    try:
        yield
    finally:
        del sys.modules[package]


with contextlib.nullcontext() if torch.cuda.is_available() else not_importable("fla"):
    from transformers.models.kimi_linear import modeling_kimi_linear as hf

__all__ = ["hf"]
