"""Block allocation that costs nothing while a request's blocks already hold its next token.

A 3:1 hybrid has four groups of cache blocks, and vLLM's scheduler walks all of them for every request in every step, to
find almost always that there is nothing to do. On a card that walk is most of a decode step at a large batch. Here the
number of tokens that a request's blocks can hold is remembered when they are allocated, and the walk left out until it
is reached. What is scheduled, and every token, is the same.

`KIMI_RL_FAST_ALLOCATE=0` switches it off.
"""

from __future__ import annotations

import functools
from typing import Any

from kimi_rl.switches import is_on

SWITCH = "KIMI_RL_FAST_ALLOCATE"

# Arguments of `allocate_slots` that ask for more than the next token's place; any of them takes the plain path.
_MORE = (
    "num_new_computed_tokens",
    "new_computed_blocks",
    "num_lookahead_tokens",
    "num_external_computed_tokens",
    "num_encoder_tokens",
    "full_sequence_must_fit",
)


def install() -> None:
    """Put the short cut in front of vLLM's KV-cache manager, if the switch is on; call again after turning the switch.

    It is read here alone: reading it at every call would cost a tenth of what the short cut saves.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager

    on = is_on(SWITCH)
    if hasattr(KVCacheManager.allocate_slots, "skipped"):
        KVCacheManager.allocate_slots.on = on
        return
    if not on:
        return
    allocate, free = KVCacheManager.allocate_slots, KVCacheManager.free

    class NoNewBlocks(KVCacheBlocks):
        """Knows without walking its groups that there is nothing in them."""

        def get_block_ids(self, allow_none: bool = False, **kwargs: Any):
            return None if allow_none else super().get_block_ids(**kwargs)

    @functools.wraps(allocate)
    def allocate_slots(self: Any, request: Any, num_new_tokens: int, *args: Any, **kwargs: Any):
        covered = self.__dict__.setdefault("_kimi_rl_covered", {})  # request id -> tokens its blocks can hold
        if (
            allocate_slots.on
            and num_new_tokens == 1
            and request.num_computed_tokens < covered.get(request.request_id, 0)
            and not args
            and not any(map(kwargs.get, _MORE))
        ):
            allocate_slots.skipped += 1
            nothing = self.__dict__.get("_kimi_rl_nothing")
            if nothing is None:
                nothing = self._kimi_rl_nothing = NoNewBlocks(self.empty_kv_cache_blocks.blocks)
            return nothing
        blocks = allocate(self, request, num_new_tokens, *args, **kwargs)
        # With prefix caching every full block must be registered, and with look-ahead more than one place is needed.
        if allocate_slots.on and blocks is not None and not self.enable_caching:
            covered[request.request_id] = _held_tokens(self, request.request_id)
        return blocks

    @functools.wraps(free)
    def free_request(self: Any, request: Any, *args: Any, **kwargs: Any):
        self.__dict__.get("_kimi_rl_covered", {}).pop(request.request_id, None)
        return free(self, request, *args, **kwargs)

    allocate_slots.on = True
    allocate_slots.skipped = 0  # calls that were left out, for tests and for whoever wonders
    KVCacheManager.allocate_slots, KVCacheManager.free = allocate_slots, free_request


def _held_tokens(manager: Any, request_id: str) -> int:
    """How many tokens fit into the request's blocks, in the group where it is least."""
    groups = manager.coordinator.single_type_managers
    return min(len(group.req_to_blocks[request_id]) * group.block_size for group in groups)
