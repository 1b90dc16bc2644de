"""When KDA groups are left out of a step's preparation, on a stand-in for vLLM's runner (see also test_vllm_engine)."""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from kimi_rl.rollout.vllm_plugin import steady_groups
from kimi_rl.rollout.vllm_plugin.steady_groups import Steady, SteadyRunner

STEP = {"num_tokens": 3, "num_reqs": 3, "max_query_len": 1, "num_tokens_padded": 4, "num_reqs_padded": 4}
STEP |= {"ubatch_slices": None, "logits_indices": object(), "use_spec_decode": False}
TOKENS = {"num_tokens_padded": 4, "num_reqs_padded": 4, "num_tokens_unpadded": 3, "ubatch_slices": None}
GROUPS = ["kda0", "mla", "kda1", "other"]


@dataclass
class Config:
    kv_cache_groups: list = field(default_factory=lambda: list(GROUPS))


class Tables(list):
    @property
    def block_tables(self):
        return self


class Buffer:
    def __init__(self, name):
        self.name, self.gpu = name, self

    def data_ptr(self):
        return id(self)


class Runner:
    """Notes which groups each call saw."""

    speculative_config = None

    def __init__(self):
        from vllm.v1.worker.block_table import SlotMappingMode as Mode

        self.kv_cache_config = Config()
        self.attn_groups = [[SimpleNamespace(layer_names=[f"{name}.{n}" for n in (1, 2)])] for name in GROUPS]
        modes = [Mode.NONE if name.startswith("kda") else Mode.TOKEN_TO_KV_SLOT for name in GROUPS]
        tables = [
            SimpleNamespace(slot_mapping_mode=mode, _kimi_rl_version=n, name=GROUPS[n], slot_mapping=Buffer(GROUPS[n]))
            for n, mode in enumerate(modes)
        ]
        self.input_batch = SimpleNamespace(block_table=Tables(tables))
        self.saw, self.calls, self.prefills, self.fails, self.fresh = [], 0, 0, False, False

    def look(self):
        self.saw = list(self.kv_cache_config.kv_cache_groups)
        assert [table.name for table in self.input_batch.block_table] == self.saw
        assert [parts[0].layer_names[0] for parts in self.attn_groups] == [f"{name}.1" for name in self.saw]
        self.calls += 1
        if self.fails:
            raise RuntimeError("out of memory")

    def _build_attention_metadata(self, num_tokens, slot_mappings, **kwargs):
        self.look()
        assert [slot_mappings[gid] for gid in range(len(self.saw))] == self.saw
        layers = [name for parts in self.attn_groups for name in parts[0].layer_names]
        return {name: SimpleNamespace(num_prefills=self.prefills, made=self.calls) for name in layers}, None

    def _get_slot_mappings(self, **kwargs):
        self.look()
        layers = {name: (self.calls, name) for parts in self.attn_groups for name in parts[0].layer_names}
        tables = self.input_batch.block_table
        buffers = [Buffer(table.name) if self.fresh else table.slot_mapping for table in tables]
        return dict(enumerate(buffers)), layers

    def _dummy_run(self, tokens):
        return self._build_attention_metadata(**STEP, slot_mappings=dict(enumerate(GROUPS)))


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setattr(steady_groups, "_is_kda", lambda group, parts: group.startswith("kda"))
    monkeypatch.setattr(Steady, "on", True)
    monkeypatch.setattr(Steady, "builds", 0)
    monkeypatch.setattr(Steady, "mappings", 0)
    runner = Runner()
    SteadyRunner(runner)
    return runner


def step(runner, **changes):
    """The groups that vLLM's own method saw, and by which call each group's metadata were made."""
    found, drafter = runner._build_attention_metadata(**STEP | changes, slot_mappings=dict(enumerate(GROUPS)))
    assert drafter is None and list(found) == [f"{name}.{n}" for name in GROUPS for n in (1, 2)]
    assert runner.kv_cache_config.kv_cache_groups == GROUPS and len(runner.attn_groups) == 4
    assert isinstance(runner.input_batch.block_table, Tables)
    return runner.saw, [found[f"{name}.2"].made for name in GROUPS]


def test_steady_steps_see_the_other_groups_alone(runner):
    assert step(runner) == (GROUPS, [1, 1, 1, 1])
    assert step(runner) == (["mla", "other"], [1, 2, 1, 2])
    assert step(runner, num_scheduled_tokens={"a": 1}) == (["mla", "other"], [1, 3, 1, 3])
    runner.input_batch.block_table[1]._kimi_rl_version = 77  # the latents' table grows
    assert step(runner) == (["mla", "other"], [1, 4, 1, 4])
    assert Steady.builds == 6


@pytest.mark.parametrize("gid", [0, 2])
def test_a_changed_table_is_built_anew(runner, gid):
    step(runner)
    runner.input_batch.block_table[gid]._kimi_rl_version = 77
    assert step(runner) == (GROUPS, [2, 2, 2, 2])
    assert step(runner) == (["mla", "other"], [2, 3, 2, 3])


@pytest.mark.parametrize(
    "changes",
    [
        {"max_query_len": 2},
        {"num_tokens": 4},
        {"num_reqs_padded": 8},
        {"num_tokens_padded": None},
        {"use_spec_decode": True},
        {"for_cudagraph_capture": True},
        {"ubatch_slices": []},
        {"cascade_attn_prefix_lens": [[0], [16], [0], [0]]},
        {"of_a_later_vllm": 0},
    ],
    ids=str,
)
def test_any_other_step_is_vllms(runner, changes):
    """And what was kept is gone: its buffers may have been filled with something else."""
    step(runner)
    assert step(runner, **changes) == (GROUPS, [2, 2, 2, 2])
    assert step(runner) == (GROUPS, [3, 3, 3, 3])
    assert Steady.builds == 0


def test_what_counts_as_a_prefill_is_not_kept(runner):
    runner.prefills = 1
    step(runner)
    assert step(runner) == (GROUPS, [2, 2, 2, 2])


def test_nothing_is_kept_over_a_dummy_run_a_failure_or_the_switch(runner, monkeypatch):
    step(runner)
    runner._dummy_run(4)
    assert all(table._kimi_rl_committed is None for table in runner.input_batch.block_table)
    assert step(runner)[0] == GROUPS
    runner.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        step(runner)
    runner.fails = False
    assert step(runner)[0] == GROUPS
    monkeypatch.setattr(Steady, "on", False)
    assert step(runner)[0] == GROUPS
    monkeypatch.setattr(Steady, "on", True)
    assert step(runner)[0] == GROUPS
    assert step(runner)[0] == ["mla", "other"]


def test_new_tables_and_unknown_ones_are_built_anew(runner):
    step(runner)
    runner.input_batch.block_table = Tables(runner.input_batch.block_table)
    assert step(runner)[0] == GROUPS
    assert step(runner)[0] == ["mla", "other"]
    runner.input_batch.block_table[2]._kimi_rl_version = None  # never written to
    assert step(runner)[0] == step(runner)[0] == GROUPS


@pytest.mark.parametrize("name", ["speculative_config", "routed_experts_initialized"])
def test_engines_that_number_groups_elsewhere_are_left_alone(runner, name):
    setattr(runner, name, True)
    runner.attn_groups = list(runner.attn_groups)  # as after a new start of the caches
    assert step(runner)[0] == step(runner)[0] == GROUPS


def mapped(runner, **changes):
    """The groups that vLLM's own method saw; none if it was not called."""
    runner.saw = []
    by_group, by_layer = runner._get_slot_mappings(**TOKENS | changes)
    assert [table.name for table in by_group.values()] == GROUPS and list(by_group) == [0, 1, 2, 3]
    assert [name for _, name in by_layer.values()] == list(by_layer) and len(by_layer) == 8
    return runner.saw


def test_padded_slot_mappings_are_filled_again_but_for_kda(runner):
    assert mapped(runner) == GROUPS
    assert mapped(runner) == mapped(runner) == ["mla", "other"]
    assert mapped(runner, num_tokens_unpadded=2) == GROUPS
    assert mapped(runner, ubatch_slices=[slice(0, 2)]) == GROUPS
    assert mapped(runner) == GROUPS
    assert mapped(runner) == ["mla", "other"]
    assert Steady.mappings == 6
    runner.attn_groups = list(runner.attn_groups)
    runner.input_batch.block_table[0].slot_mapping_mode = None  # of a group whose mapping is computed
    assert mapped(runner) == mapped(runner) == GROUPS


def test_slot_mappings_without_padding_are_views_that_stay(runner, monkeypatch):
    monkeypatch.setattr(steady_groups, "_is_kda", lambda group, parts: False)  # all-MLA models too
    runner.attn_groups = list(runner.attn_groups)
    assert mapped(runner, num_tokens_padded=3) == GROUPS
    assert mapped(runner, num_tokens_padded=3) == mapped(runner, num_tokens_padded=3) == []
    assert mapped(runner) == mapped(runner) == GROUPS
    runner.input_batch.block_table[1].slot_mapping = Buffer("elsewhere")
    runner.fresh = True
    assert mapped(runner, num_tokens_padded=3) == mapped(runner, num_tokens_padded=3) == GROUPS


def test_tables_on_the_card_follow_every_change(monkeypatch):
    """Random changes of vLLM's own tables, of one block a row and of growing ones."""
    from vllm.v1.worker.block_table import BlockTable, SlotMappingMode

    steady_groups.install()
    monkeypatch.setattr(Steady, "copies", 0)
    steady, growing = tables = [
        BlockTable(16, 8, 32, 64, False, torch.device("cpu"), 1, SlotMappingMode.NONE) for _ in range(2)
    ]
    rng, versions = random.Random(3), []
    rows = 0
    for _ in range(400):
        change = rng.choice(["add", "append", "append", "append", "drop", "swap", "none"])
        row = rng.randrange(rows) if rows else 0
        if change == "add" and rows < 8:
            for table in tables:
                table.add_row([rng.randrange(1, 99)], rows)
            rows += 1
        elif change == "append" and rows and growing.num_blocks_per_row[row] < 32:
            steady.append_row([], row)
            growing.append_row([rng.randrange(1, 99)], row)
        elif change == "drop" and rows > 1:
            rows -= 1
            for table in tables:
                table.clear_row(row)
                if row != rows:
                    table.move_row(rows, row)
        elif change == "swap" and rows:
            for table in tables:
                table.swap_row(row, rows - 1)
        for table in tables:
            table.commit_block_table(rows)
            assert torch.equal(table.block_table.gpu[:rows], table.block_table.cpu[:rows])
        versions.append(getattr(steady, "_kimi_rl_version", None))
    assert Steady.copies > 150
    assert len(set(versions)) < 250, "an empty list of new blocks is no change"
