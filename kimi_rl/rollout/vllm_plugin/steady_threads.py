"""One number of threads for all that vLLM computes on a CPU in this process.

vLLM's CPU kernels pack weights for the number of threads there is, and keep one layout per shape for the process: with
another number, or in a second engine started with another, they multiply with weights in the wrong places, without a
word. vLLM forbids `torch.set_num_threads` from an engine's start on; but this process is not the engine's alone. So the
number with which the first engine started holds inside every call of an engine, and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

log = logging.getLogger(__name__)

_packed_with: int | None = None  # the first engine's number


@contextlib.contextmanager
def steady_threads() -> Iterator[None]:
    """The first engine's number of threads, for a call of an engine; without effect on a card."""
    global _packed_with
    if torch.cuda.is_available():
        yield
        return
    set_num_threads, before = torch.set_num_threads, torch.get_num_threads()  # vLLM replaces the former by a warning
    if _packed_with is None:
        _packed_with = before
    if before == _packed_with:
        yield
        return
    log.info("vLLM works with %d threads in this process, as its first engine did, not %d", _packed_with, before)
    set_num_threads(_packed_with)
    try:
        yield
    finally:
        set_num_threads(before)
