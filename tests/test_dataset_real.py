"""load_problems on the real data sets, where a checkout has them beside it."""

import json
from pathlib import Path

import datasets
import pytest

from kimi_rl.dataset import Problems, load_problems
from kimi_rl.dataset.columns import last_boxed
from kimi_rl.recipe import DataSection

SHARED = Path(__file__).parents[1] / "../shared/data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")


def load(path: Path, **how) -> Problems:
    return load_problems(DataSection(path=str(path)), **how)


def read_jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def test_gsm8k_from_jsonl_and_from_hub_format_parquet(tmp_path):
    local = load(SHARED / "gsm8k")
    assert (len(local.train), len(local.held_out)) == (7473, 256)
    assert (
        local.train[0]["question"].startswith("Natalia sold clips to 48") and local.train[0]["answer"] == "72"
    )
    for row in local.train:
        assert str(int(row["answer"])) == row["answer"]
        assert row["solution"].endswith(f"\n#### {row['answer']}")
        assert "<<" not in row["solution"]
    (tmp_path / "main").mkdir()
    for split in ("train", "test"):
        rows = datasets.Dataset.from_list(read_jsonl(SHARED / f"gsm8k/{split}.jsonl"))
        rows.to_parquet(tmp_path / f"main/{split}-00000-of-00001.parquet")
    copy = load(tmp_path)
    for split in ("train", "held_out"):
        ours, theirs = (getattr(p, split).remove_columns("id").to_list() for p in (local, copy))
        assert ours == theirs


@pytest.mark.parametrize(
    "name,empty_boxes", [("math/train.jsonl", 2), ("math/train12k_extra.jsonl", 0), ("math500/test.jsonl", 0)]
)
def test_math_answers_come_out_of_the_solutions(tmp_path, name, empty_boxes):
    """In the hub's own columns (no `answer`), the last box gives the same answers as the files state.

    MATH's training split also holds one answer that is no maths (1/7 of "triangle ABC").
    """
    rows = read_jsonl(SHARED / name)
    hub_columns = [{"problem": row["problem"], "solution": row["solution"]} for row in rows]
    datasets.Dataset.from_list(hub_columns).to_parquet(tmp_path / "test.parquet")
    from_solutions = load(tmp_path / "test.parquet", evaluation=True)
    readable = [row for row in rows if "\\triangle ABC" not in row["answer"]]
    stated = [row["answer"].strip() for row in readable if "\\boxed{}" not in row["solution"]]
    assert from_solutions.held_out["answer"] == stated
    assert len(from_solutions.dropped) == len(rows) - len(stated) == empty_boxes + len(rows) - len(readable)

    local = load(SHARED / name, evaluation=True)
    assert local.held_out["answer"] == [row["answer"].strip() for row in readable]
    for row in local.held_out:
        assert last_boxed(row["solution"]).strip() == row["answer"]


@pytest.mark.parametrize(
    "name,rows",
    [
        ("math500", 500),
        ("aime2024.jsonl", 30),
        ("aime2025.jsonl", 30),
        ("amc23.jsonl", 40),
        ("minerva_math", 272),
        ("olympiadbench", 673),
        ("svamp", 1000),
        ("olymmath_en/hard.jsonl", 100),
    ],
)
def test_evaluation_sets(name, rows):
    problems = load(SHARED / name, evaluation=True)
    assert len(problems.held_out) == rows
    assert len(problems.dropped) == (2 if name == "olympiadbench" else 0)  # a sentence, and `t(0,4]`
    assert len(set(problems.held_out["id"])) == rows
    assert all(problems.held_out["answer"]) and all(problems.held_out["solution"])
