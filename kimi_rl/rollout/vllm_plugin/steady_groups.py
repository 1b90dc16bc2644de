"""Cache groups cost nothing in steps in which their blocks stay as they are.

A 3:1 hybrid has four groups of cache blocks, three of them of KDA states, where a request holds one block from its
first token to its last. In every step vLLM copies each group's table of blocks to the card again, and for each group
makes slot mappings and attention metadata, with some twenty small operations. Here

- a table that has not changed is not copied again (`install`);
- slot mappings, which are views of buffers, are kept while the number of tokens stays (`attach`);
- in a step of decoding alone in which no KDA table has changed, vLLM's runner is shown the other groups only, and the
  KDA layers keep the metadata they had: what is in them depends on the tables and the number of sequences (`attach`).

What the kernels read is the same.

`KIMI_RL_STEADY_GROUPS=0` switches it off.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

from kimi_rl.switches import is_on

log = logging.getLogger(__name__)

SWITCH = "KIMI_RL_STEADY_GROUPS"

_CHANGES = ("clear_row", "move_row", "swap_row", "clear")  # a table; others call these or `append_row`
_versions = itertools.count(1)

# What vLLM's runner names in a step of decoding alone. Any other argument takes the plain path.
_BUILD = {
    "num_tokens",
    "num_tokens_padded",
    "num_reqs",
    "num_reqs_padded",
    "max_query_len",
    "logits_indices",
    "max_num_sampled_tokens",
    "num_scheduled_tokens",
    "slot_mappings",
}
_MAP = {"num_tokens_padded", "num_reqs_padded", "num_tokens_unpadded"}


class Steady:
    """Whether it is on, and what was left out, for tests and for whoever wonders."""

    on = True
    copies = 0  # of tables
    builds = 0  # of a group's metadata
    mappings = 0  # of a group's tokens


def install() -> None:
    """Put it before vLLM's tables of blocks; call again after turning the switch. Plain vLLM where impossible."""
    Steady.on = is_on(SWITCH)
    try:
        from vllm.v1.worker.block_table import BlockTable

        if hasattr(BlockTable.commit_block_table, "__wrapped__") or not Steady.on:
            return
        methods = {name: _counted(getattr(BlockTable, name)) for name in _CHANGES}
        methods["append_row"] = _counted_append(BlockTable.append_row)
        methods["commit_block_table"] = _commit(BlockTable.commit_block_table)
    except (AttributeError, ImportError) as error:
        log.warning("tables of cache blocks are copied in every step: this vLLM is built otherwise (%s)", error)
        return
    for name, method in methods.items():
        setattr(BlockTable, name, method)


def attach(llm: Any) -> None:
    """Put it before the V1 runner of `llm` (a `vllm.LLM` in this process). Plain vLLM where that is impossible.

    An engine that starts with the switch off has vLLM's runner as it is.
    """
    if not Steady.on:
        return
    try:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        if hasattr(runner, "input_batch"):  # the V2 runner has none
            SteadyRunner(runner)
    except (AttributeError, ImportError) as error:
        log.warning("KDA's metadata are prepared anew in every step: this vLLM is built otherwise (%s)", error)


def _counted(change: Callable) -> Callable:
    @functools.wraps(change)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._kimi_rl_version = next(_versions)
        return change(self, *args, **kwargs)

    return counted


def _counted_append(append: Callable) -> Callable:
    @functools.wraps(append)
    def append_row(self: Any, block_ids: Any, row_idx: int) -> None:
        if block_ids:  # a request that gets a block in one group gets an empty list in the others
            self._kimi_rl_version = next(_versions)
        append(self, block_ids, row_idx)

    return append_row


def _commit(commit: Callable) -> Callable:
    @functools.wraps(commit)
    def commit_block_table(self: Any, num_reqs: int) -> None:
        state = (getattr(self, "_kimi_rl_version", None), num_reqs)
        if Steady.on and state[0] is not None and state == getattr(self, "_kimi_rl_committed", None):
            Steady.copies += 1
            return
        commit(self, num_reqs)
        self._kimi_rl_committed = state

    return commit_block_table


class SteadyRunner:
    """Called in place of methods of a V1 runner. Keeps what belongs to KDA groups from step to step."""

    def __init__(self, runner: Any):
        self._runner = runner
        self._build, self._map, self._dummy = (
            runner._build_attention_metadata,
            runner._get_slot_mappings,
            runner._dummy_run,
        )
        self._groups = _Groups(runner)
        # The last result of either with what it was made of; only the newest, whose buffers no later call has filled.
        self._built: tuple[tuple, dict[str, Any]] | None = None
        self._mapped: tuple[tuple, dict[int, Any], dict[str, Any]] | None = None
        runner._build_attention_metadata = self.build_attention_metadata
        runner._get_slot_mappings = self.get_slot_mappings
        runner._dummy_run = self.dummy_run

    def build_attention_metadata(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        kept, self._built = self._built, None
        groups = self._current_groups()
        key = groups.key(**kwargs) if groups.kda and _is_plain(args, kwargs, _BUILD) else None
        if key is None:
            return self._build(*args, **kwargs)
        if kept is None or kept[0] != key:
            metadata, drafter = self._build(**kwargs)
            if all(metadata[name].num_prefills == 0 for name in groups.kda_layers):  # a token may be a whole prompt
                self._built = key, {name: metadata[name] if name in groups.kda_layers else None for name in metadata}
            return metadata, drafter
        mappings = kwargs["slot_mappings"]
        kwargs["slot_mappings"] = {place: mappings[gid] for place, gid in enumerate(groups.others)}
        metadata, drafter = self._for_the_others(groups, self._build, kwargs)
        self._built = kept
        Steady.builds += len(groups.kda)
        return kept[1] | metadata, drafter

    def get_slot_mappings(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Beginnings of the tables' buffers, with padding filled: the same in every step with as many tokens.

        KDA's tables have no slots, so nothing but padding is ever written there; the others' padding is filled again.
        """
        kept, self._mapped = self._mapped, None
        if not _is_plain(args, kwargs, _MAP):
            return self._map(*args, **kwargs)
        groups = self._current_groups()
        key = groups, *kwargs.values()
        if kept is None or kept[0] != key:
            by_group, by_layer = self._map(**kwargs)
            if groups.are_mapped_to(by_group):
                self._mapped = key, by_group, by_layer
            return by_group, by_layer
        _, by_group, by_layer = kept
        if kwargs.get("num_tokens_padded") == kwargs.get("num_tokens_unpadded"):
            Steady.mappings += len(by_group)
        elif groups.kda and groups.kda_is_unmapped:
            others, layers = self._for_the_others(groups, self._map, kwargs)
            by_group = by_group | {gid: others[place] for place, gid in enumerate(groups.others)}
            by_layer = by_layer | layers
            Steady.mappings += len(groups.kda)
        else:
            return self._map(**kwargs)
        self._mapped = kept
        return by_group, by_layer

    def dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        """It fills the buffers, and the tables on the card, for sequences that are none."""
        self._forget()
        try:
            return self._dummy(*args, **kwargs)
        finally:
            self._forget()

    def _forget(self) -> None:
        self._built = self._mapped = None
        for table in self._runner.input_batch.block_table.block_tables:
            table._kimi_rl_committed = None

    def _current_groups(self) -> _Groups:
        if not self._groups.are_of(self._runner):
            self._groups = _Groups(self._runner)
        return self._groups

    def _for_the_others(self, groups: _Groups, method: Callable, kwargs: dict[str, Any]) -> Any:
        """Call `method` of a runner that has no KDA groups."""
        runner, batch = self._runner, self._runner.input_batch
        runner.kv_cache_config, runner.attn_groups, batch.block_table = groups.without_kda
        try:
            return method(**kwargs)
        finally:
            runner.kv_cache_config, runner.attn_groups, batch.block_table = groups.whole


class _Groups:
    """A runner's cache groups: the steady ones, of KDA layers, and the others."""

    def __init__(self, runner: Any):
        from vllm.v1.worker.block_table import SlotMappingMode

        self.whole = runner.kv_cache_config, runner.attn_groups, runner.input_batch.block_table
        config, attention, tables = self.whole
        every = range(len(config.kv_cache_groups))
        self.kda = [gid for gid in every if _is_kda(config.kv_cache_groups[gid], attention[gid])]
        self.others = [gid for gid in every if gid not in self.kda]
        if not self.others or runner.speculative_config or getattr(runner, "routed_experts_initialized", False):
            self.kda = []  # all takes the plain path
        self._tables = [tables[gid] for gid in self.kda]
        self.kda_layers = {name for gid in self.kda for part in attention[gid] for name in part.layer_names}
        self.kda_is_unmapped = all(table.slot_mapping_mode is SlotMappingMode.NONE for table in self._tables)
        self.without_kda = (
            dataclasses.replace(config, kv_cache_groups=[config.kv_cache_groups[gid] for gid in self.others]),
            [attention[gid] for gid in self.others],
            [tables[gid] for gid in self.others],
        )

    def are_of(self, runner: Any) -> bool:
        config, attention, tables = self.whole
        return (
            runner.kv_cache_config is config
            and runner.attn_groups is attention
            and runner.input_batch.block_table is tables
        )

    def are_mapped_to(self, by_group: dict[int, Any]) -> bool:
        """Whether these are the buffers of the groups' tables."""
        tables = self.whole[2]
        return all(found.data_ptr() == tables[gid].slot_mapping.gpu.data_ptr() for gid, found in by_group.items())

    def key(
        self,
        num_tokens: int,
        num_reqs: int,
        max_query_len: int,
        num_tokens_padded: int | None = None,
        num_reqs_padded: int | None = None,
        slot_mappings: Any = None,
        **_: Any,
    ) -> tuple | None:
        """What KDA's metadata of a step of decoding alone are made of; None for any other step."""
        if max_query_len != 1 or num_tokens != num_reqs or slot_mappings is None:
            return None
        versions = [getattr(table, "_kimi_rl_version", None) for table in self._tables]
        if None in versions:
            return None
        return self, *versions, num_reqs, num_reqs_padded, num_tokens_padded


def _is_plain(args: tuple, kwargs: dict[str, Any], plain: set[str]) -> bool:
    """False if it is switched off, or if the arguments ask for more than a plain step."""
    if args or not Steady.on:
        return False
    # More are such as ubatches, speculative decoding, capture of a CUDA graph.
    return all(value is None or value is False or name in plain for name, value in kwargs.items())


def _is_kda(group: Any, attention_groups: Any) -> bool:
    """Whether it holds states that stay in their blocks. With prefix caching, they move."""
    from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import MambaSpec

    spec = group.kv_cache_spec
    if type(spec) is not MambaSpec or spec.mamba_cache_mode != "none":
        return False
    return all(type(part.get_metadata_builder()) is GDNAttentionMetadataBuilder for part in attention_groups)
