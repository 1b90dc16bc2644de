"""Chooses which implementation of a kernel runs.

Every kernel folder holds a `reference` (plain recurrent PyTorch, any device), a `torch` form (fast PyTorch,
any device) and, where it pays, a form for NVIDIA cards: `fla` (Triton kernels of `fla-core`) or `flex` (PyTorch's
FlexAttention). The choice depends on the tensor's device and dtype alone, never on grad mode, so the policy,
the old policy and the reference model of one training step always run the same arithmetic. (`kda_decode` is
the exception that cannot be avoided: see there.)

`KIMI_RL_KERNELS=reference|torch|fla|auto` (default `auto`) forces a choice. The first use of each (kernel,
choice, device) is logged once at INFO level.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

from kimi_rl.errors import InputError

logger = logging.getLogger(__name__)

ENV = "KIMI_RL_KERNELS"
CHOICES = ("auto", "reference", "torch", "fla")


@functools.cache
def fla_installed() -> bool:
    """Whether `fla` (fla-core or flash-linear-attention) and Triton are installed; imports neither."""
    return all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))


def choose(kernel: str, tensor: torch.Tensor, *, has_fla: bool, has_flex: bool = False) -> str:
    """Name of the implementation of `kernel` to run on tensors like `tensor`: "reference", "torch", "fla" or "flex".

    `has_fla` says whether this kernel has an fla form; without one, "fla" means "torch". `has_flex` says whether it has
    a FlexAttention form, which takes the place of "torch" on a GPU unless "torch" is forced.
    Raises `InputError` on an unknown value of the environment variable, or where a forced
    "fla" cannot run.
    """
    forced = os.environ.get(ENV, "auto")
    if forced not in CHOICES:
        raise InputError(f"{ENV}: found {forced!r}; use one of {', '.join(CHOICES)}")
    on_gpu = tensor.device.type == "cuda"
    runnable = on_gpu and tensor.dtype != torch.float64 and fla_installed()
    if forced == "auto":
        choice = "fla" if has_fla and runnable else "torch"
    elif forced == "fla":
        if has_fla and not runnable:
            raise InputError(
                f"{ENV}=fla: {kernel} got {tensor.dtype} on {tensor.device}, fla installed: "
                f"{fla_installed()}; the fla kernels need an NVIDIA GPU, a dtype below float64 and "
                "`pip install flash-linear-attention`"
            )
        choice = "fla" if has_fla else "torch"
    else:
        choice = forced
    if choice == "torch" and forced != "torch" and has_flex and on_gpu and tensor.dtype != torch.float64:
        choice = "flex"
    _log_once(kernel, choice, tensor.device.type)
    return choice


@functools.cache
def _log_once(kernel: str, choice: str, device: str) -> None:
    logger.info("kernel %s on %s: %s", kernel, device, choice)


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Dtype the delta rule is computed in: float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def sequence_bounds(cu_seqlens: torch.Tensor, batch: int, length: int) -> list[int]:
    """`cu_seqlens` as a list [0, end_1, ..., T], checked against a packed input of shape [1, T, ...].

    Raises `ValueError` naming what is wrong: a wrong bound would silently mix two sequences.
    """
    bounds = [int(x) for x in cu_seqlens.tolist()]
    if batch != 1:
        raise ValueError(f"packed input (cu_seqlens) needs batch size 1, found {batch}")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(
            f"cu_seqlens must run from 0 to the packed length {length}, found {bounds[:1]}..{bounds[-1:]}"
        )
    if any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens must not decrease, found {bounds}")
    return bounds
