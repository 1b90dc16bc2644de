"""load_problems: formats, splits, subsets, hub names, and one clear line for every kind of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from kimi_rl.dataset import load_problems
from kimi_rl.dataset.columns import find_columns, last_boxed, parse_row
from kimi_rl.dataset.registry import INSTRUCTIONS, SOURCES, find_source
from kimi_rl.errors import InputError
from kimi_rl.recipe import DataSection

REPO = Path(__file__).parents[1]

GSM8K_ROW = {
    "question": "Tom has 1,000 marbles and buys 234. How many has he?",
    "answer": "He has 1000+234=<<1000+234=1234>>1,234 marbles.\n#### 1,234",
}
MATH_ROW = {
    "problem": "What is $\\frac12+\\frac14$?",
    "level": "Level 1",
    "type": "Algebra",
    "solution": "A quarter more than a half is $\\boxed{\\frac{3}{4}}$.",
}
DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nFind $x$.\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def load(path=None, evaluation=False, **section):
    if path is not None:
        section["path"] = str(path)
    return load_problems(DataSection(**section), evaluation=evaluation)


def write_jsonl(file: Path, rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def plain_rows(count: int, start: int = 0) -> list[dict]:
    return [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(start, start + count)]


def error_of(path=None, **section) -> str:
    with pytest.raises(InputError) as error:
        load(path, **section)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- Formats
# ---------------------------------------------------------------------------------------------------


def test_gsm8k_columns(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [GSM8K_ROW, GSM8K_ROW | {"question": "And you?"}])
    write_jsonl(tmp_path / "test.jsonl", [GSM8K_ROW | {"question": "And she?"}])
    problems = load(tmp_path)
    row = problems.train[0]
    assert row == {
        "id": "train/1",
        "question": GSM8K_ROW["question"],
        "prompt": [{"role": "user", "content": f"{GSM8K_ROW['question']}\n{INSTRUCTIONS['hash']}"}],
        "solution": "He has 1000+234=1,234 marbles.\n#### 1234",
        "answer": "1234",
    }
    assert problems.held_out["id"] == ["test/1"]
    assert problems.train.column_names == problems.held_out.column_names
    assert problems.answer_kind == "math"


def test_math_columns_with_and_without_answer(tmp_path):
    rows = [MATH_ROW, MATH_ROW | {"problem": "Again?", "answer": "0.75", "id": "algebra/7"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [MATH_ROW | {"problem": "Test?"}])
    train = load(tmp_path).train
    assert train["answer"] == ["\\frac{3}{4}", "0.75"]
    assert train["id"] == ["train/1", "algebra/7"]
    assert train[0]["solution"] == MATH_ROW["solution"]
    # The last box differs from the gold answer: the solution gets an ending that the reward accepts.
    assert train[1]["solution"] == MATH_ROW["solution"] + "\n\\boxed{0.75}"
    assert train[0]["prompt"][0]["content"].endswith(INSTRUCTIONS["boxed"])


@pytest.mark.parametrize(
    "row,question,answer",
    [
        ({"problem": "P?", "answer": 27.0}, "P?", "27"),
        (
            {"Body": "Jo has 3.", "Question": "How many?", "Answer": "3.0", "ID": "chal-1"},
            "Jo has 3. How many?",
            "3.0",
        ),
        ({"question": "Q?", "final_answer": ["$2$", "$-1$"], "solution": ["By parts."]}, "Q?", "2, -1"),
        ({"question": "Q?", "answer": "$\\frac{1}{2}$"}, "Q?", "\\frac{1}{2}"),
        ({"question": "Which?", "answer": "$x$ or $y$"}, "Which?", "$x$ or $y$"),
        ({"question": "Pair?", "answer": "so\n#### (1, 2)"}, "Pair?", "(1, 2)"),
        (
            {
                "prompt": [{"role": "user", "content": DAPO_PROMPT}],
                "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            },
            "Find $x$.",
            "34",
        ),
    ],
)
def test_other_columns(row, question, answer):
    parsed = parse_row(row, find_columns(row))
    assert (parsed.question, parsed.answer) == (question, answer)
    ending = parsed.solution.splitlines()[-1]
    assert ending == (f"#### {answer}" if parsed.form == "hash" else f"\\boxed{{{answer}}}")


@pytest.mark.parametrize(
    "text,content",
    [
        (r"\boxed{1} then \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{\begin{matrix}1\\2\\\end{matrix}}", r"\begin{matrix}1\\2\\\end{matrix}"),
        (r"$\boxed 7$.", "7"),
        (r"\fbox{C}", "C"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{}", ""),
        ("no box", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


# --- Files and folders
# -----------------------------------------------------------------------------------------


def test_parquet_jsonl_and_hub_layout_give_the_same_rows(tmp_path):
    train, test = plain_rows(30), plain_rows(5, start=100)
    write_jsonl(tmp_path / "a/train.jsonl", train)
    write_jsonl(tmp_path / "a/test.jsonl", test)
    (tmp_path / "b").mkdir()
    (tmp_path / "c/data").mkdir(parents=True)
    datasets.Dataset.from_list(train).to_parquet(tmp_path / "b/train.parquet")
    datasets.Dataset.from_list(test).to_parquet(tmp_path / "b/validation.parquet")
    datasets.Dataset.from_list(train[:20]).to_parquet(tmp_path / "c/data/train-00000-of-00002.parquet")
    datasets.Dataset.from_list(train[20:]).to_parquet(tmp_path / "c/data/train-00001-of-00002.parquet")
    datasets.Dataset.from_list(test).to_parquet(tmp_path / "c/data/test-00000-of-00001.parquet")
    loaded = [load(tmp_path / name) for name in "abc"]
    for split in ("train", "held_out"):
        rows = [getattr(problems, split).remove_columns("id").to_list() for problems in loaded]
        assert len(rows[0]) == {"train": 30, "held_out": 5}[split]
        assert rows[0] == rows[1] == rows[2]


def test_single_file_is_split_by_seed(tmp_path):
    file = write_jsonl(tmp_path / "problems.jsonl", plain_rows(200))
    first, again, other = load(file), load(file), load(file, seed=1)
    assert (len(first.train), len(first.held_out)) == (180, 20)
    assert not set(first.train["question"]) & set(first.held_out["question"])
    assert first.held_out["id"] == again.held_out["id"] != other.held_out["id"]
    assert len(load(file, held_out_size=50).held_out) == 50
    whole = load(file, evaluation=True)
    assert (len(whole.train), len(whole.held_out)) == (0, 200)


def test_repeats_do_not_cross_a_seeded_split(tmp_path):
    rows = [row | {"question": row["question"] + end} for row in plain_rows(40) for end in ("", "  ", "?")]
    problems = load(write_jsonl(tmp_path / "problems.jsonl", rows), held_out_size=10)
    train, held_out = ({q.rstrip(" ?") for q in s["question"]} for s in (problems.train, problems.held_out))
    assert len(held_out) == 10 and len(train) == 30 and not train & held_out


def test_subsets(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", plain_rows(300))
    write_jsonl(tmp_path / "test.jsonl", plain_rows(400, start=1000))
    everything = load(tmp_path)
    assert (len(everything.train), len(everything.held_out)) == (300, 256)
    assert len(load(tmp_path, evaluation=True).held_out) == 400
    some, same, others = (load(tmp_path, train_size=50, held_out_size=20, seed=s) for s in (0, 0, 1))
    assert (len(some.train), len(some.held_out)) == (50, 20)
    assert some.train["id"] == same.train["id"] != others.train["id"]
    rows = [int(name.split("/")[1]) for name in some.train["id"]]
    assert rows == sorted(rows) and rows[-1] > 200  # drawn from everywhere, kept in source order


def test_instruction(tmp_path):
    file = write_jsonl(tmp_path / "problems.jsonl", plain_rows(20))
    assert load(file, instruction="").train[0]["prompt"][0]["content"].startswith("What is")
    for text, ending in (("", "?"), ("Be brief.", "?\nBe brief.")):
        assert load(file, instruction=text).train[0]["prompt"][0]["content"].endswith(ending)


def test_empty_boxes_are_dropped_with_a_list(tmp_path):
    empty = MATH_ROW | {"problem": "Which? (A) (B)", "solution": "So \\boxed{}."}
    write_jsonl(tmp_path / "train.jsonl", [MATH_ROW, empty, MATH_ROW | {"problem": "P"}])
    write_jsonl(tmp_path / "test.jsonl", [MATH_ROW | {"problem": "Q"}])
    problems = load(tmp_path)
    assert len(problems.train) == 2
    assert [d.rsplit("/", 1)[-1] for d in problems.dropped] == [
        "train.jsonl, row 2: the gold answer is empty"
    ]


LONG = "A train leaves the station at noon and travels at a steady 60 km/h. How far has it come after {} hours?"


@pytest.mark.parametrize("text,kind", [("what is 7  plus 7", "exact"), (LONG.format(3) + " Explain.", "near")])
def test_overlap_of_given_splits_is_refused_unless_allowed(tmp_path, caplog, text, kind):
    write_jsonl(tmp_path / "train.jsonl", [*plain_rows(20), {"question": LONG.format(3), "answer": "180"}])
    write_jsonl(tmp_path / "test.jsonl", [{"question": text, "answer": "14"}, *plain_rows(3, 90)])
    pair = f"test/1 = train/{8 if kind == 'exact' else 21} ({kind})"
    message = error_of(tmp_path)
    assert pair in message and f"1 {kind}" in message and "data.overlap=leave_out" in message
    assert len(load(tmp_path, evaluation=True).held_out) == 4  # nothing is trained on
    assert len(load(tmp_path, overlap="allow").train) == 21 and pair in caplog.text
    left = load(tmp_path, overlap="leave_out", held_out_size=1)  # whichever of the four that is
    assert len(left.train) == 20 and "left out 1 training problems" in caplog.text
    assert len(load(tmp_path, overlap="leave_out", held_out_size=1, train_size=20).train) == 20
    assert len(load(tmp_path, overlap="leave_out", evaluation=True).held_out) == 4


def test_other_numbers_are_no_overlap(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"question": LONG.format(3), "answer": "180"}])
    write_jsonl(tmp_path / "test.jsonl", [{"question": LONG.format(4), "answer": "240"}])
    assert len(load(tmp_path).train) == 1


def test_near_repeats_leave_the_training_rows_where_the_held_out_ones_are_drawn(tmp_path):
    rows = [{"question": LONG.format(3) + " Well?" * (n % 2), "answer": "180"} for n in range(10)]
    file = write_jsonl(tmp_path / "problems.jsonl", [*plain_rows(6), *rows])
    for seed in range(8):
        problems = load(file, seed=seed, held_out_size=4)
        held_out = any("train leaves" in question for question in problems.held_out["question"])
        trained = sum("train leaves" in question for question in problems.train["question"])
        assert trained == (0 if held_out else 10)


def test_unreadable_golds_are_left_out_and_named(tmp_path, caplog):
    golds = ["\\frac{1}{7}\\triangle ABC", "3", "1/2", "t(0,4]", "2.50", "x^2+1"]
    rows = [{"id": f"p{n}", "question": f"Which is number {n}?", "answer": gold} for n, gold in enumerate(golds)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [{"question": "And the last one of all?", "answer": "4"}])
    problems = load(tmp_path)
    assert problems.train["id"] == ["p1", "p2", "p4", "p5"]
    assert [(entry.split(":")[0], "unparseable_gold" in entry) for entry in problems.dropped] == [
        ("p0", True),
        ("p3", True),
    ]
    assert "left out 2 rows" in caplog.text and "triangle" in caplog.text
    assert len(load(tmp_path, check_golds=False).train) == 6
    write_jsonl(tmp_path / "train.jsonl", rows[:1])
    write_jsonl(tmp_path / "test.jsonl", rows[:1])
    assert "data.check_golds=false" in error_of(tmp_path)


def test_the_gold_check_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, kimi_rl.dataset.golds as g; g.unusable_golds(['pi']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_awkward_bytes_in_jsonl(tmp_path):
    """Byte order mark, blank lines, Windows line ends, and Unicode line separators inside a text."""
    rows = [row | {"question": row["question"] + "\u2028\x85 really?"} for row in plain_rows(12)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines) + b"\r\n")
    assert load(tmp_path / "p.jsonl", evaluation=True).held_out["question"] == [r["question"] for r in rows]


# --- Tasks
# -----------------------------------------------------------------------------------------------------


def test_task_rows():
    problems = load(task="arithmetic", params={"level": 1}, train_size=100, held_out_size=10)
    row = problems.train[0]
    assert row["prompt"] == [{"role": "user", "content": row["question"]}]
    assert row["id"] == "arithmetic/train/0" and row["solution"].endswith(f"#### {row['answer']}")
    assert (len(problems.train), len(problems.held_out), problems.name) == (100, 10, "arithmetic")
    assert not set(problems.train["question"]) & set(problems.held_out["question"])


def test_task_defaults_and_answer_kinds():
    small = load(task="arithmetic", params={"level": 1, "digits": 1})
    assert len(small.train) + len(small.held_out) == 81
    assert len(load(task="stack", evaluation=True).train) == 0
    kinds = {
        t: load(task=t, train_size=2, held_out_size=2).answer_kind for t in ("arithmetic", "mqar", "stack")
    }
    assert kinds == {"arithmetic": "math", "mqar": "exact", "stack": "exact"}


def test_task_size_that_cannot_be_met():
    message = error_of(task="arithmetic", params={"level": 1, "digits": 1}, train_size=500)
    assert message.startswith(
        "data.train_size: asked for 500, but arithmetic with these parameters has only about "
    )


# --- Bad input
# -------------------------------------------------------------------------------------------------


def test_missing_paths(tmp_path):
    assert error_of(tmp_path / "none") == f"data.path: no such file or folder: {tmp_path / 'none'}"
    assert "no such file or folder: ./none/data.jsonl" in error_of("./none/data.jsonl")
    assert error_of("gsm8").endswith("did you mean gsm8k?")
    assert "known data sets: gsm8k, hendrycks_math" in error_of("nonsense")
    assert "known: arithmetic, palindrome, mqar, stack" in error_of(task="nonsense")


def test_folder_without_splits(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert "has no train.jsonl, test.jsonl or their .parquet (found notes.txt)" in error_of(tmp_path)
    assert "is no data file; use .jsonl or .parquet" in error_of(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "line,reason",
    [
        (b'{"question": "Q"}', "no answer (found question); needs a column `answer`"),
        (b'{"question": "Q", "answer": null}', "no answer"),
        (b'{"question": "Q", "answer": " "}', "no answer (column `answer` is empty or missing)"),
        (b'{"problem": "Q", "solution": "no box"}', "no answer: `solution` holds no \\boxed{}"),
        (b'{"answer": "1"}', "no question (found answer); needs a column `question` or `problem`"),
        (b'{"question": " ", "answer": "1"}', "the question is empty"),
        (b'{"question": "Q", "answer": "1"', "not valid JSON (Expecting ',' delimiter at column "),
        (b'{"question": "Q" "answer": "1"}', "not valid JSON (Expecting ',' delimiter at column 18)"),
        (b'["Q", "1"]', "found a JSON list, each line is one JSON object"),
        (b'{"question": "\xff", "answer": "1"}', "not UTF-8 (byte 15 of the line)"),
    ],
)
def test_bad_rows_name_file_and_row(tmp_path, line, reason):
    good = json.dumps(plain_rows(1)[0]).encode()
    file = tmp_path / "train.jsonl"
    file.write_bytes(good + b"\n\n" + line + b"\n")
    message = error_of(tmp_path)
    assert f"{file}, row 3: " in message and reason in message


def test_unreadable_files(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR?")
    assert "bad.parquet is no valid parquet file" in error_of(tmp_path / "bad.parquet")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert error_of(tmp_path / "empty.jsonl").endswith("empty.jsonl holds no rows")


def test_sizes_that_cannot_be_met(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", plain_rows(30))
    assert "cannot hold out 30 of the 30 different problems" in error_of(tmp_path, held_out_size=30)
    write_jsonl(tmp_path / "test.jsonl", plain_rows(9, start=50))
    assert "data.train_size: asked for 31, but" in error_of(tmp_path, train_size=31)
    assert "data.held_out_size: asked for 10, but" in error_of(tmp_path, held_out_size=10)
    only_test = write_jsonl(tmp_path / "other/test.jsonl", plain_rows(9)).parent
    assert "has no training problems, only some to evaluate on" in error_of(only_test)
    assert len(load(only_test, evaluation=True, train_size=5).held_out) == 9


# --- The hub
# ---------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands in for `datasets.load_dataset`; keeps what was asked for."""

    def __init__(self, splits: dict[str, list[dict]]):
        self.splits = splits
        self.calls: list[tuple] = []

    def __call__(self, hub_id, config=None, *, split=None):
        self.calls.append((hub_id, config, split))
        if split is None:
            return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in self.splits.items()})
        return datasets.Dataset.from_list([row for name in split.split("+") for row in self.splits[name]])


@pytest.fixture
def hub(monkeypatch):
    def install(**splits):
        fake = FakeHub(splits)
        monkeypatch.setattr(datasets, "load_dataset", fake)
        return fake

    return install


@pytest.mark.parametrize("name", ["openai/gsm8k", "gsm8k", "OpenAI/GSM8K"])
def test_hub_gsm8k_gives_the_same_rows_as_the_local_files(tmp_path, hub, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # no folder called gsm8k here
    train = [GSM8K_ROW | {"question": f"Q{n}"} for n in range(12)]
    test = [GSM8K_ROW | {"question": f"T{n}"} for n in range(4)]
    write_jsonl(tmp_path / "local/train.jsonl", train)
    write_jsonl(tmp_path / "local/test.jsonl", test)
    fake = hub(train=train, test=test)
    from_hub, local = load(name, train_size=6, seed=3), load(tmp_path / "local", train_size=6, seed=3)
    assert sorted(fake.calls) == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    for split in ("train", "held_out"):
        ours, theirs = (getattr(p, split).remove_columns("id").to_list() for p in (from_hub, local))
        assert ours == theirs and len(ours) == {"train": 6, "held_out": 4}[split]
    assert from_hub.name == "gsm8k"


def test_hendrycks_math_trains_on_all_but_math_500(hub):
    math500 = MATH_ROW | {"problem": "Held out: $x + 1$?", "answer": "1", "unique_id": "test/1.json"}
    fake = hub(train=[MATH_ROW], test=[MATH_ROW | {"problem": "Held out:  $x+1$ ?"}, math500])
    problems = load("EleutherAI/hendrycks_math", held_out_size=1)
    assert ("EleutherAI/hendrycks_math", "precalculus", "train+test") in fake.calls
    assert ("HuggingFaceH4/MATH-500", None, "test") in fake.calls
    assert len(fake.calls) == 8
    assert set(problems.train["question"]) == {MATH_ROW["problem"]} and len(problems.train) == 7
    assert "Held out" in problems.held_out["question"][0]


def test_dapo_repeats_are_left_out(hub):
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": f"Problem {n % 5}?", "role": "user"}],
            "reward_model": {"ground_truth": str(n % 5), "style": "rule"},
            "extra_info": {"index": str(n)},
        }
        for n in range(50)
    ]
    hub(train=rows)
    problems = load("dapo_math_17k", held_out_size=1)
    assert (len(problems.train), len(problems.held_out)) == (4, 1)
    assert set(problems.train["answer"]) | set(problems.held_out["answer"]) == set("01234")


def test_numina_rows_without_a_checkable_answer_are_dropped(hub):
    valid = {"problem_is_valid": "Yes", "solution_is_valid": "Yes", "solution": "..."}
    rows = [{"problem": f"P{n}", "answer": str(n)} | valid for n in range(10)]
    rows += [
        {"problem": "Show it.", "answer": "proof"} | valid,
        {"problem": "?", "answer": "notfound"} | valid,
    ]
    rows += [{"problem": "Incomplete", "answer": "3"} | valid | {"problem_is_valid": "Incomplete"}]
    hub(train=rows)
    problems = load("AI-MO/NuminaMath-1.5", held_out_size=1)
    assert len(problems.train) == 9
    assert [d.partition(": ")[2] for d in problems.dropped] == [
        "the gold answer is 'proof'",
        "the gold answer is 'notfound'",
    ]


def test_evaluation_set_that_calls_its_split_train(hub):
    fake = hub(train=[{"problem": f"P{n}", "answer": "033", "solution": "\\boxed{033}"} for n in range(30)])
    assert len(load("aime2024", evaluation=True).held_out) == 30
    assert fake.calls == [("HuggingFaceH4/aime_2024", None, "train")]
    assert "has no training problems" in error_of("aime2024")


def test_hub_set_outside_the_registry(hub):
    fake = hub(train=plain_rows(20), validation=plain_rows(3, start=50))
    problems = load("somebody/maths")
    assert fake.calls == [("somebody/maths", None, None)]
    assert (len(problems.train), len(problems.held_out)) == (20, 3)
    hub(dev_only=plain_rows(3))
    assert "has no split `train` or `test` (found dev_only)" in error_of("somebody/maths")
    hub(train=[{"text": "x"}])
    assert "somebody/maths/train: no question (found text)" in error_of("somebody/maths")


def test_registry_names_are_unique_and_found():
    aliases = [source.alias for source in SOURCES]
    assert len(set(aliases)) == len(aliases)
    for source in SOURCES:
        assert find_source(source.alias) is source
        assert find_source(source.hub_id).hub_id == source.hub_id
        assert source.train or source.held_out
        assert source.held_out_from is None or find_source(source.held_out_from).held_out


def test_offline_hub_set_is_one_line():
    program = (
        "from kimi_rl.dataset import load_problems\n"
        "from kimi_rl.errors import InputError\n"
        "from kimi_rl.recipe import DataSection\n"
        "try:\n"
        "    load_problems(DataSection(path='openai/gsm8k'))\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    with_cache_empty = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent/hf"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=with_cache_empty, cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        "data.path: cannot load openai/gsm8k (config main, split test) from the Hugging"
    )
    assert lines[0].endswith(
        "offline, give a local folder with train.jsonl and test.jsonl in the same columns"
    )
