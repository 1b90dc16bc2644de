"""Cache groups cost nothing in steps in which their blocks stay as they are.

A 3:1 hybrid has four groups of cache blocks, three of them of KDA states, where a request holds one block from its
first token to its last. In every step vLLM copies each group's table of blocks to the card again, and builds each
group's attention metadata from it with some twenty small operations. Here a table that has not changed is not copied
again, and in a step of decoding alone a KDA group whose table has not changed keeps its metadata: all that is in them
depends on the table and on the number of sequences. What the kernels read is the same.

`KIMI_RL_STEADY_GROUPS=0` switches it off.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

SWITCH = "KIMI_RL_STEADY_GROUPS"

_CHANGES = ("append_row", "clear_row", "move_row", "swap_row", "clear")  # a table; others call these
_versions = itertools.count(1)
_tables: dict[int, weakref.ref] = {}  # where a table lies on the device -> the table


class Steady:
    """Whether it is on, and what was left out, for tests and for whoever wonders."""

    on = True
    copies = 0
    builds = 0


def install() -> None:
    """Put it before vLLM's V1 runner; call again after turning the switch. Plain vLLM where that is impossible."""
    Steady.on = os.environ.get(SWITCH, "1") != "0"
    try:
        from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder as Builder
        from vllm.v1.worker.block_table import BlockTable

        if hasattr(BlockTable.commit_block_table, "__wrapped__") or not Steady.on:
            return
        changes = {name: _counted(getattr(BlockTable, name)) for name in _CHANGES}
        methods = {"commit_block_table": _commit(BlockTable.commit_block_table)}
        build = _build(Builder.build)
    except (AttributeError, ImportError) as error:
        log.warning("cache groups are prepared anew in every step: this vLLM is built otherwise (%s)", error)
        return
    for name, method in (changes | methods).items():
        setattr(BlockTable, name, method)
    Builder.build = build


def _counted(change: Callable) -> Callable:
    @functools.wraps(change)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._kimi_rl_version = next(_versions)
        return change(self, *args, **kwargs)

    return counted


def _commit(commit: Callable) -> Callable:
    @functools.wraps(commit)
    def commit_block_table(self: Any, num_reqs: int) -> None:
        state = (getattr(self, "_kimi_rl_version", None), num_reqs)
        if Steady.on and state[0] is not None and state == getattr(self, "_kimi_rl_committed", None):
            Steady.copies += 1
            return
        commit(self, num_reqs)
        self._kimi_rl_committed = state
        _tables[self.block_table.gpu.data_ptr()] = weakref.ref(self)

    return commit_block_table


def _build(build: Callable) -> Callable:
    @functools.wraps(build)
    def build_or_keep(self: Any, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        # More arguments come with speculative decoding and when CUDA graphs are captured.
        key = None if args or kwargs or not Steady.on else _key(self, common_attn_metadata)
        kept = self.__dict__.pop("_kimi_rl_kept", None)  # (key, metadata) of the last build, which own the buffers
        if kept is None or key is None or kept[0] != key:
            kept = (key, build(self, common_prefix_len, common_attn_metadata, *args, **kwargs))
        else:
            Steady.builds += 1
        if key is not None and kept[1].num_prefills == 0:  # a prompt of one token may count as a prefill
            self._kimi_rl_kept = kept
        return kept[1]

    return build_or_keep


def _key(builder: Any, common: Any) -> tuple | None:
    """What the metadata of a step of decoding alone are made of; None for any other step."""
    if common.max_query_len != 1 or builder.use_spec_decode:
        return None
    if builder.vllm_config.cache_config.mamba_cache_mode != "none":  # with prefix caching, states move
        return None
    place = common.block_table_tensor.data_ptr()
    table = _tables[place]() if place in _tables else None
    version = getattr(table, "_kimi_rl_version", None)
    if version is None:
        return None
    starts = common.query_start_loc
    return version, place, common.num_reqs, common.num_actual_tokens, starts.data_ptr(), starts.shape[0]
