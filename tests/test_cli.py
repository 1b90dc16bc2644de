"""Bad input: one clear line naming what and where, exit code 2, no traceback, nothing written."""

import json
import os
from pathlib import Path

import pytest
from runs import command, environment, run, run_inside, write_recipe


def refused(tmp_path: Path, *overrides: str, recipe: Path | None = None, out: Path | None = None, by=run_inside) -> str:
    target = out or tmp_path / "run"
    before = sorted(target.rglob("*")) if target.exists() else None
    done = by("train", recipe or write_recipe(tmp_path), *overrides, "--out", target)
    assert done.returncode == 2, done.stdout + done.stderr
    text = done.stderr.strip()
    assert len(text.splitlines()) == 1 and text.startswith("error: "), text
    after = sorted(target.rglob("*")) if target.exists() else None
    assert before == after, "something was written"
    return text


@pytest.mark.parametrize(
    "override,words",
    [
        ("stages.rlvr.learning_rat=1", ["learning_rat", "learning_rate"]),
        ("stages.rlvr.steps=many", ["stages.1.steps", "many"]),
        ("stages.rlvr.batch_size=10", ["group_size (4)", "batch_size (10)", "10 % 4 = 2"]),
        ("data.task=arithmetik", ["arithmetik", "arithmetic", "palindrome", "mqar", "stack"]),
        ("model.size=huge", ["huge", "tiny", "small"]),
        ("model.path=./no/such/model", ["model.path", "no/such/model"]),
        ("data.path=./no/such/file.jsonl", ["no/such/file.jsonl"]),
    ],
)  # fmt: skip
def test_recipe_mistakes(tmp_path, override, words):
    text = refused(tmp_path, override)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "rows,words",
    [
        (['{"question": "1+1=?", "answer": "#### 2"}', '{"question": "2+2=?"}'], ["train.jsonl", "2", "answer"]),
        (['{"question": "1+1=?", "answer": "#### 2"}', '{"question": '], ["train.jsonl", "2", "JSON"]),
    ],
)
def test_data_mistakes_name_file_and_row(tmp_path, rows, words):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    text = refused(tmp_path, f"data.path={folder}")
    assert all(word in text for word in words), text


def test_model_folder_without_config(tmp_path):
    (tmp_path / "model").mkdir()
    text = refused(tmp_path, f"model.path={tmp_path}/model")
    assert "config.json" in text and "model.path" in text


def test_missing_recipe(tmp_path):
    for by in (run, run_inside):  # a process of its own, and the way the other tests here take
        assert "nothing.yaml" in refused(tmp_path, recipe=tmp_path / "nothing.yaml", by=by)


def test_non_empty_output_folder(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    text = refused(tmp_path, out=out)
    assert str(out) in text and "--resume" in text
    assert (out / "precious.txt").read_text() == "keep me"


@pytest.mark.skipif(os.name != "posix", reason="needs /proc")
def test_unwritable_output_folder(tmp_path):
    assert "/proc" in refused(tmp_path, out=Path("/proc/kimi_rl_run"))


def test_help_is_quick_and_teaches():
    import subprocess

    done = subprocess.run(command("train", "--help"), env=environment(), capture_output=True, text=True, timeout=20)
    assert done.returncode == 0
    assert "stages.rlvr" in done.stdout and "--resume" in done.stdout


@pytest.mark.parametrize("engine", ["transformers"])
def test_generate(tmp_path, tiny_models, engine):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+2=?"}\n{"prompt_ids": [20, 30, 40]}\n')
    model = tiny_models["hybrid", "dense"]
    done = run("generate", model, "--prompts", prompts, "--engine", engine, "--max-tokens", 8, "--greedy", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 and rows[1]["prompt_ids"] == [20, 30, 40]
    for row in rows:
        assert set(row) == {"prompt_ids", "token_ids", "logprobs", "text", "finish_reason"}
        assert len(row["token_ids"]) == len(row["logprobs"]) <= 8
        assert all(value <= 0 for value in row["logprobs"])


def test_generate_names_the_bad_row(tmp_path, tiny_models):
    prompts = tmp_path / "prompts.jsonl"
    for text, words in [
        ('{"prompt": "a"}\n{"prmpt": "b"}\n', ["prompts.jsonl", "row 2"]),
        ('{"prompt_ids": [1, 999999]}\n', ["row 1", "999999"]),
        ("oops\n", ["row 1", "JSON"]),
    ]:
        prompts.write_text(text)
        done = run_inside("generate", tiny_models["hybrid", "dense"], "--prompts", prompts)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr


def test_verify_says_why(tmp_path):
    done = run_inside("verify", "--gold", "1/2", "--answer", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "correct"
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"gold": "4", "completion": "so #### 4"}\n{"gold": "4", "completion": "so #### 5"}\n')
    done = run_inside("verify", "--cases", cases, "--json")
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["correct", "wrong"]


def test_eval(tmp_path, tiny_models):
    records = tmp_path / "records.jsonl"
    done = run(
        "eval", tiny_models["hybrid", "dense"], "data.params.level=1", "--data", "arithmetic", "--limit", 6, "--k", 2,
        "--max-tokens", 4, "--engine", "transformers", "--out", records, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["n"] == 6 and figures["k"] == 2 and 0 <= figures["held_out_accuracy"] <= 1
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(rows) == 6 and {"id", "question", "completion", "status", "reason"} <= set(rows[0])


@pytest.mark.parametrize(
    "arguments,words",
    [
        ((), ["--data"]),
        (("--data", "./nowhere"), ["nowhere"]),
        (("--data", "arithmetic", "data.params.levl=1"), ["levl", "level"]),
        (("--data", "arithmetic", "--engine", "vlm"), ["vlm", "transformers"]),
    ],
)
def test_eval_mistakes(tiny_models, arguments, words):
    done = run_inside("eval", tiny_models["hybrid", "dense"], *arguments)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_a_reporter_that_is_not_installed(tmp_path):
    from importlib.util import find_spec

    missing = next(name for name in ("wandb", "trackio", "tensorboard") if find_spec(name) is None)
    assert f"pip install {missing}" in refused(tmp_path, f"report_to=[{missing}]")
