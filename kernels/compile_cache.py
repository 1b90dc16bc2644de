"""Where compiled kernels and their tuning are kept, so that a second start is quick.

fla's kernels are Triton's, and keep what autotuning found in Triton's cache; FlexAttention's are TorchInductor's; vLLM
keeps what it compiled of a model in a folder of its own. All read their folders from the environment, once, when first
imported: so it is set for a process before it starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from kimi_rl.errors import InputError

ENV = "KIMI_RL_KERNEL_CACHE"
TUNED = Path(__file__).parent / "tuned"
SAME_CHIP = {"nvidia_h200": "nvidia_h100_80gb_hbm3"}  # with another memory


def cache_environment(folder: str | None = None) -> dict[str, str]:
    """Environment variables that keep compiled kernels in `folder`, or in that of $KIMI_RL_KERNEL_CACHE.

    Empty where neither is given: then the libraries' own folders and variables hold. Raises `InputError` if the folder
    cannot be made or written to.
    """
    where, chosen = ("kernel_cache", folder) if folder else (ENV, os.environ.get(ENV))
    if not chosen:
        return {}
    root = Path(chosen).expanduser().resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        writable = os.access(root, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise InputError(f"{where}: cannot write to {chosen}; give a folder for compiled kernels, or leave it out")
    return {
        "TRITON_CACHE_DIR": str(root / "triton"),
        "TRITON_CACHE_AUTOTUNING": "1",  # also what kernels outside fla were tuned to
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
        "VLLM_CACHE_ROOT": str(root / "vllm"),
    }


def tuned_environment(cards: Sequence[str]) -> dict[str, str]:
    """Environment variables with which fla takes its kernels' tuning for this card from `kernels/tuned/`.

    `cards`: names as the driver gives them. Empty where there is nothing for them, where they differ, or where the
    environment tells fla already what to do.
    """
    if len(set(cards)) != 1 or {"FLA_CONFIG_DIR", "FLA_CACHE_MODE"} & set(os.environ):
        return {}
    name = re.sub(r"[^a-z0-9]+", "_", cards[0].lower()).strip("_")
    folder = TUNED / SAME_CHIP.get(name, name)
    return {"FLA_CONFIG_DIR": str(folder), "FLA_CACHE_MODE": "full"} if folder.is_dir() else {}
