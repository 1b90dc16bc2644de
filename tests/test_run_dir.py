"""The run folder: refusals, atomic writes, and what a kill leaves behind."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from kimi_rl.errors import InputError
from kimi_rl.recipe_load import dump_recipe, parse_recipe
from kimi_rl.run_dir import TEMP, RunDir, atomic_dir, atomic_write_text, describe_environment, only_one

TEXT = """
data: {task: arithmetic}
stages:
- {kind: sft, steps: 10}
- {kind: rlvr, steps: 5}
- {kind: rlvr, steps: 5, name: more}
"""
RECIPE = dump_recipe(parse_recipe(TEXT))


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.create(tmp_path / "run", RECIPE)


# ---------------------------------------------------------------------------------------------------- create


def test_create_writes_the_recipe(run):
    assert os.listdir(run.path) == ["recipe.yaml"]
    assert run.recipe_path.read_text() == RECIPE
    assert run.stage_names() == ["sft", "rlvr", "more"]


def test_a_folder_with_something_in_it_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="not empty .*add --resume to continue"):
        RunDir.create(run.path, RECIPE)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="such as notes.txt.*choose another --out"):
        RunDir.create(other, RECIPE)
    assert os.listdir(other) == ["notes.txt"]


def test_a_folder_with_only_an_unfinished_write_counts_as_empty(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f"{TEMP}recipe.yaml-1-1").write_text("data:")
    run = RunDir.create(folder, RECIPE)
    assert os.listdir(run.path) == ["recipe.yaml"]


def test_unwritable_places_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory"):
        RunDir.create(tmp_path / "file", RECIPE)
    with pytest.raises(InputError, match="Not a directory.*choose another --out"):
        RunDir.create(tmp_path / "file" / "run", RECIPE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(InputError, match="Permission denied"):
        RunDir.create(tmp_path / "locked", RECIPE)


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    with (
        only_one(tmp_path / "run", "another run is writing there"),
        pytest.raises(InputError, match="run: another run is writing there; wait for it"),
        only_one(tmp_path / "run", "another run is writing there", wait_s=0.3),
    ):
        pass
    with only_one(tmp_path / "run", "another run is writing there"):
        pass  # let go
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), only_one(tmp_path / "file" / "run", "busy"):
        pass


def test_resume(run, tmp_path):
    run.write_summary({"status": "failed"})
    again = RunDir.create(run.path, RECIPE, resume=True)
    assert again.recipe_path.read_text() == RECIPE
    assert again.summary() == {}  # it is running again
    with pytest.raises(InputError, match="nothing to resume"):
        RunDir.create(tmp_path / "absent", RECIPE, resume=True)
    assert not (tmp_path / "absent").exists()
    changed = dump_recipe(parse_recipe(TEXT, ["stages.rlvr.learning_rate=0.5"]))
    with pytest.raises(InputError, match=r"stages\.1\.learning_rate is 0\.0001 .* and 0\.5 now"):
        RunDir.create(run.path, changed, resume=True)
    assert run.recipe_path.read_text() == RECIPE


# --------------------------------------------------------------------------------------------------- metrics


def row(stage: str, step: int, **values) -> dict:
    return {"type": "train", "stage": stage, "step": step, **values}


def test_metrics_round_trip_as_strict_json(run):
    run.append_metrics(row("sft", 1, loss=np.float32(0.5), note="é\nb", bad=math.nan, worse=-math.inf))
    assert run.read_metrics() == [row("sft", 1, loss=0.5, note="é\nb", bad=None, worse=None)]
    assert run.metrics_path.read_bytes().count(b"\n") == 1
    with pytest.raises(ValueError, match="needs `stage` and `step`"):
        run.append_metrics({"stage": "sft"})


@pytest.mark.parametrize("torn", [b'{"stage": "sft", "ste', b"{", b'{"stage": "sft", "step": 2}', b"\xc3"])
def test_a_torn_last_line_is_ignored_and_cut_off_on_resume(run, torn):
    run.append_metrics(row("sft", 1))
    with open(run.metrics_path, "ab") as file:
        file.write(torn)
    assert run.read_metrics() == [row("sft", 1)]
    again = RunDir.create(run.path, RECIPE, resume=True)
    assert run.metrics_path.read_bytes().endswith(b"}\n")
    with open(run.metrics_path, "ab") as file:
        file.write(torn)
    again.append_metrics(row("sft", 2))  # a learner started again inside one run finds its own torn line
    assert again.read_metrics() == [row("sft", 1), row("sft", 2)]


def test_a_broken_line_inside_is_named(run):
    run.metrics_path.write_text('{"stage": "sft", "step": 1}\n{"sta\n{"stage": "sft", "step": 2}\n')
    with pytest.raises(InputError, match="line 2 is no JSON object"):
        run.read_metrics()


def test_truncate_metrics_drops_later_steps_and_later_stages(run):
    # "a later stage" is meant in the recipe's order, wherever its rows stand in the file
    for stage, step in [("more", 1), ("sft", 1), ("sft", 10), ("rlvr", 0), ("rlvr", 2), ("rlvr", 3)]:
        run.append_metrics(row(stage, step))
    run.truncate_metrics("rlvr", 2)
    assert [(r["stage"], r["step"]) for r in run.read_metrics()] == [
        ("sft", 1), ("sft", 10), ("rlvr", 0), ("rlvr", 2)
    ]  # fmt: skip
    run.append_metrics(row("rlvr", 2, when="after"))
    run.truncate_metrics("rlvr", 2)
    assert len(run.read_metrics()) == 4  # a stage that is taken up again repeats its closing evaluation
    run.truncate_metrics("sft", -1)
    assert run.read_metrics() == []
    with pytest.raises(ValueError, match="no stage 'sfd'; its stages: sft, rlvr, more"):
        run.truncate_metrics("sfd", 0)


def test_truncate_metrics_of_a_run_without_metrics(run):
    run.truncate_metrics("sft", -1)
    assert run.read_metrics() == []


# -------------------------------------------------------------------------------------------------- rollouts


def test_rollouts_round_trip_with_the_columns_of_all_rows(run):
    rows = [{"completion": "a", "reward": 1.0}, {"completion": "ü\n", "reward": None, "parsed": "7"}]
    path = run.write_rollouts("rlvr", 3, rows)
    assert path == run.path / "rollouts/rlvr/step_000003.parquet"
    assert run.read_rollouts("rlvr", 3) == [
        {"completion": "a", "reward": 1.0, "parsed": None},
        {"completion": "ü\n", "reward": None, "parsed": "7"},
    ]
    run.write_rollouts("rlvr", 3, rows[:1])
    assert len(run.read_rollouts("rlvr", 3)) == 1
    assert os.listdir(path.parent) == [path.name]


def test_rollouts_that_cannot_be_written_leave_nothing(run):
    import pyarrow as pa

    with pytest.raises(pa.ArrowException):
        run.write_rollouts("rlvr", 1, [{"reward": 1.0}, {"reward": {"a": 1}}])
    assert run.rollout_steps("rlvr") == []
    assert not list(run.path.glob("rollouts/rlvr/*"))


def test_truncate_rollouts_includes_evaluations(run):
    for stage in ("sft_eval_before", "rlvr", "rlvr_eval_during", "more", "more_eval_before"):
        for step in (0, 2, 1_000_000):
            run.write_rollouts(stage, step, [{"completion": "x"}])
    run.truncate_rollouts("rlvr", 1)
    left = {name: run.rollout_steps(name) for name in os.listdir(run.path / "rollouts")}
    assert left == {"sft_eval_before": [0, 2, 1_000_000], "rlvr": [0], "rlvr_eval_during": [0]}


# ----------------------------------------------------------------------------------- state and atomic writes


def test_state_and_summary(run):
    assert run.load_state() == {} and run.summary() == {}
    run.save_state({"completed": [{"name": "sft", "model": Path("m"), "se": math.nan}]})
    assert run.load_state() == {"completed": [{"name": "sft", "model": "m", "se": None}]}
    run.write_summary({"a": 1})
    assert json.loads((run.path / "summary.json").read_text()) == {"a": 1}
    assert run.stage_dir(1, "rlvr") == run.path / "stages/1_rlvr" and run.stage_dir(1, "rlvr").is_dir()


def test_every_start_adds_an_environment(run):
    run.write_environment({"python": "3.11"})
    run.write_environment({"python": "3.12"})
    first, second = run.environments()
    assert (first["python"], second["python"]) == ("3.11", "3.12") and first["started"] <= second["started"]


def test_publish_model_replaces_the_old_one(run):
    for name in ("a", "b"):
        folder = run.stage_dir(0, "sft") / name
        folder.mkdir()
        (folder / f"{name}.safetensors").write_text(name)
        assert run.publish_model(folder) == run.path / "model"
    assert os.listdir(run.path / "model") == ["b.safetensors"]


def test_a_broken_state_file_is_named(run):
    (run.path / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state\.json: not JSON"):
        run.load_state()


def test_atomic_write_keeps_the_old_text_when_it_fails(tmp_path):
    target = tmp_path / "a.txt"
    atomic_write_text(target, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(target, "new \ud800")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_atomic_dir(tmp_path):
    target = tmp_path / "deep" / "model"
    with atomic_dir(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError, match="stop"), atomic_dir(target) as folder:
        (folder / "b").write_text("2")
        raise RuntimeError("stop")
    assert os.listdir(target) == ["a"]
    with atomic_dir(target) as folder:
        (folder / "c").write_text("3")
    assert os.listdir(target) == ["c"] and os.listdir(target.parent) == ["model"]


def test_a_kill_in_the_middle_of_writes_leaves_every_file_whole(tmp_path):
    run = RunDir.create(tmp_path / "run", RECIPE)
    script = textwrap.dedent(f"""
        import itertools
        from kimi_rl.run_dir import RunDir
        run = RunDir({str(run.path)!r})
        for step in itertools.count(1):
            run.append_metrics({{"stage": "sft", "step": step, "text": "x" * 5000}})
            run.save_state({{"step": step, "text": "y" * 50000}})
            print(step, flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    reported = 0
    while reported < 20:
        reported = int(process.stdout.readline())
    process.kill()
    rest = process.communicate()[0].split()
    reported = int(rest[-1]) if rest else reported
    again = RunDir.create(run.path, RECIPE, resume=True)
    steps = [r["step"] for r in again.read_metrics()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= reported
    assert again.load_state()["step"] >= reported and len(again.load_state()["text"]) == 50000
    assert not list(again.path.glob(f"{TEMP}*"))


# --------------------------------------------------------------------------------------------------- imports


def test_environment_names_what_is_missing(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    assert describe_environment()["versions"]["transformers"].startswith("5.")
    monkeypatch.setattr(metadata, "version", missing)
    assert describe_environment()["versions"]["transformers"] is None


def test_the_driver_side_modules_import_nothing_heavy():
    code = (
        "import sys, kimi_rl.run_dir, kimi_rl.recipe_load, kimi_rl.progress, kimi_rl.report.report\n"
        "heavy = ('torch', 'transformers', 'ray', 'datasets', 'pandas', 'pyarrow', 'plotly')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
