"""One compilation for all checkpoints of an architecture, wherever they lie.

vLLM keeps what torch.compile made of a model, and finds it again by a hash of all its settings. The model's folder is
one of them, and every run has folders of its own: so each run compiles anew what the run before it compiled, and so
does every evaluation of what it leaves. Compiled code depends on the architecture, which is in the hash as well, and
holds no weights. Here the folder is left out of the hash of Kimi Linear models, whose code is vLLM's or this package's
and never the folder's own.

`KIMI_RL_COMPILED_ONCE=0` switches it off.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from kimi_rl.switches import is_on

SWITCH = "KIMI_RL_COMPILED_ONCE"


def install() -> None:
    """Leave the folder out of vLLM's hash of a model's configuration. Safe to call repeatedly."""
    from vllm.config import ModelConfig

    plain = ModelConfig.compute_hash
    if getattr(plain, "_kimi_rl_anywhere", False):
        return

    @functools.wraps(plain)
    def compute_hash(self: Any) -> str:
        if not is_on(SWITCH) or "KimiLinearForCausalLM" not in (self.architectures or ()):
            return plain(self)
        anywhere = copy.copy(self)
        object.__setattr__(anywhere, "model", "")  # the class checks what is assigned
        return plain(anywhere)

    compute_hash._kimi_rl_anywhere = True
    ModelConfig.compute_hash = compute_hash
