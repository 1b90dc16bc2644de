"""`rollout.workers: auto`: how many engines share a card, what memory each gets, and that resumed runs keep it."""

import json
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from kimi_rl.card_share import CARD_SHARE
from kimi_rl.recipe import RolloutSection
from kimi_rl.rollout.pool import pool_settings
from kimi_rl.rollout.replicas import choose_workers, one_worker, settle_workers, share_memory

GIB = 2**30
ROOM = {"cores": 16, "share_bytes": 32 * GIB, "replica_bytes": 4 * GIB}


def never():
    raise AssertionError("measured although there was nothing to measure")


@pytest.mark.parametrize(
    ("step_ms", "gpu_ms", "room", "expected"),
    [
        (4.4, 1.5, {}, 3),
        (1.5, 1.5, {}, 1),
        (0.9, 1.5, {}, 1),  # a step cannot be shorter than the card's work; measured apart, it may seem so
        (30.0, 1.5, {}, 4),
        (6.0, 1.5, {"cores": 5}, 2),
        (6.0, 1.5, {"cores": 1}, 1),
        (6.0, 1.5, {"replica_bytes": 11 * GIB}, 2),
        (6.0, 1.5, {"replica_bytes": 40 * GIB}, 1),
    ],
)
def test_engines_that_keep_a_card_busy(step_ms, gpu_ms, room, expected):
    assert choose_workers(step_ms / 1e3, gpu_ms / 1e3, **(ROOM | room)) == expected


def test_engines_share_what_one_would_have():
    assert share_memory(RolloutSection(), 4) == {"gpu_memory_utilization": CARD_SHARE / 4}
    given = {"gpu_memory_utilization": 0.6, "enforce_eager": True}
    third = share_memory(RolloutSection(engine_args=given), 3)
    assert third == {"gpu_memory_utilization": pytest.approx(0.2), "enforce_eager": True}
    shared = dict(model_folder="m", max_model_len=8, seed=0, threads=1)
    section = RolloutSection(workers=2, engine_args=given)
    on_card = pool_settings(section, device="cuda", **shared)
    assert on_card["engine_args"]["gpu_memory_utilization"] == 0.3 and on_card["num_gpus"] == 0.25
    assert pool_settings(section, device="cpu", **shared)["engine_args"] == given


def test_numbers_stay_and_a_cpu_has_one(tmp_path):
    record = tmp_path / "workers.json"
    options = {"cores": 16, "probe": never}
    given = RolloutSection(workers=3)
    assert settle_workers(given, record, device="cuda", **options) is given
    for section, device in [
        (RolloutSection(workers="auto", engine="vllm"), "cpu"),
        (RolloutSection(workers="auto", engine="transformers"), "cuda"),
    ]:
        settled = settle_workers(section, record, device=device, **options)
        assert settled.workers == 1 and settled.engine_args == {}
    least = RolloutSection(workers="auto", min_workers=2)
    assert settle_workers(least, record, device="cpu", **options).min_workers == 1
    assert not record.exists()


def test_a_choice_is_measured_once_and_kept(tmp_path):
    record = tmp_path / "stage" / "workers.json"
    section = RolloutSection(workers="auto", engine="vllm", engine_args={"gpu_memory_utilization": 0.5})
    measured = dict(step_s=0.0044, gpu_s=0.0015, card_bytes=80 * GIB, engine_bytes=3 * GIB, cache_bytes=2 * GIB)
    first = settle_workers(section, record, device="cuda", cores=16, probe=lambda: dict(measured))
    assert first.workers == 3 and first.engine_args == {
        "gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 2 * GIB
    }  # fmt: skip
    kept = json.loads(record.read_text())
    assert kept == measured | {"cores": 16, "share_bytes": 40 * GIB, "replica_bytes": 5 * GIB, "workers": 3}
    # Resumed on a machine with fewer cores: no second measurement, the same engines.
    assert settle_workers(section, record, device="cuda", cores=2, probe=never) == first
    # With two cards apart from the learner's: so many on each.
    apart = section.model_copy(update={"cards": 2})
    assert settle_workers(apart, record, device="cuda", cores=2, probe=never).workers == 6
    assert one_worker(apart).cards == 1 and one_worker(section).cards == 0


def test_recipes_take_a_number_or_auto():
    assert RolloutSection(workers="auto", min_workers=2).workers == "auto"
    for workers in ("many", 0):
        with pytest.raises(ValidationError, match="workers"):
            RolloutSection(workers=workers)
    with pytest.raises(ValidationError, match="must not exceed workers"):
        RolloutSection(workers=1, min_workers=2)


def test_a_run_in_a_part_of_a_card_asks_for_its_part_alone(monkeypatch):
    shared = dict(model_folder="m", max_model_len=64, seed=0, threads=1, device="cuda")
    whole = pool_settings(RolloutSection(engine="vllm", workers=2), **shared)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    group = SimpleNamespace(bundle_specs=[{"GPU": 0.1666}])
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: group)
    found = pool_settings(RolloutSection(engine="vllm", workers=2), **shared)
    assert (whole["num_gpus"], found["num_gpus"]) == (0.25, 0.0416)
    ratio = found["engine_args"]["gpu_memory_utilization"] / whole["engine_args"]["gpu_memory_utilization"]
    assert ratio == pytest.approx(0.1666)
