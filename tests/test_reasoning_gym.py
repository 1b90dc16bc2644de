"""The procedural tasks of the reasoning-gym package: steady disjoint splits, and its own scores as verdicts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_rl.dataset import load_problems
from kimi_rl.dataset.tasks import get_task, is_task
from kimi_rl.errors import InputError
from kimi_rl.recipe import DataSection
from kimi_rl.rewards import VerifierPool
from kimi_rl.rewards.reasoning_gym import KIND, encode_gold

REPO = Path(__file__).parents[1]


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match="pip install reasoning-gym") as error:
        load_problems(DataSection(task="reasoning_gym/chain_sum"))
    assert "\n" not in str(error.value) and is_task("reasoning_gym/chain_sum")


def test_a_gold_keeps_tuples_whole_number_keys_and_numpy_text():
    numpy = pytest.importorskip("numpy")
    metadata = {"t": (1, {2: "x"}), "n": [numpy.str_("a")], "o": object()}
    gold = json.loads(encode_gold("d", {}, {"answer": 7, "question": "q", "metadata": metadata}))
    assert gold["metadata"] == "{'t': (1, {2: 'x'}), 'n': ['a']}" and gold["answer"] == "7"


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("reasoning_gym", reason="needs reasoning-gym")


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(deadline_s=2.0) as pool:
        yield pool


def problems(name, **section):
    return load_problems(DataSection(task=f"reasoning_gym/{name}", **section))


def test_splits_are_seeded_and_disjoint(package):
    sizes = {"train_size": 60, "held_out_size": 20}
    first, other = (problems("chain_sum", **sizes, seed=seed) for seed in (0, 1))
    again = problems("chain_sum", **sizes, seed=0)
    assert list(first.train["question"]) == list(again.train["question"]) != list(other.train["question"])
    train = {*first.train["question"], *other.train["question"]}
    held_out = {*first.held_out["question"], *other.held_out["question"]}
    assert len(first.train) == 60 and len(first.held_out) == 20 and not train & held_out
    assert len(set(first.train["question"])) == 60
    assert first.train[0]["prompt"][0]["content"].endswith("\\boxed{}.")


def test_the_same_problems_in_another_process(package):
    code = (
        "from kimi_rl.dataset.tasks import get_task; t = get_task('reasoning_gym/number_sorting'); "
        "print([p.answer for p in t.problems(5, 'held_out', 3, t.parse_params({'max_numbers': 5}))])"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    task = get_task("reasoning_gym/number_sorting")
    here = [p.answer for p in task.problems(5, "held_out", 3, task.parse_params({"max_numbers": 5}))]
    assert other.stdout == f"{here}\n"


@pytest.mark.parametrize(
    "name,params,message",
    [
        ("chain_summ", {}, "reasoning_gym/chain_sum"),
        ("knight_swap", {}, "other problems in every process"),
        ("graph_color", {}, "states no answer"),
        ("chain_sum", {"max_term": 3}, "max_terms"),
        ("chain_sum", {"seed": 3}, "data.seed"),
        ("chain_sum", {"max_terms": 1}, "max_terms must be >= min_terms"),
        ("chain_sum", {"max_terms": "many"}, "'many'"),
    ],
)
def test_bad_names_and_parameters_are_one_line(package, name, params, message):
    with pytest.raises(InputError) as error:
        problems(name, params=params)
    assert message in str(error.value) and "\n" not in str(error.value)


# Several answers are right: puzzle24 (any expression worth 24), n_queens, knights_knaves (any order); text: ab.
@pytest.mark.parametrize("name", ["chain_sum", "puzzle24", "n_queens", "knights_knaves", "ab"])
def test_solutions_are_right_and_other_answers_wrong(package, pool, name):
    found = problems(name, train_size=4, held_out_size=1)
    golds = list(found.train["answer"])
    own = pool.verify_many(list(zip(found.train["solution"], golds, strict=True)), kind=found.answer_kind)
    assert {verdict.status for verdict in own} == {"correct"}, own
    crossed = pool.verify_many([("\\boxed{0}", gold) for gold in golds], kind=found.answer_kind)
    assert {verdict.status for verdict in crossed} == {"wrong"}


def test_another_right_answer_is_right_and_part_of_the_score_is_wrong(package, pool):
    gold = encode_gold(
        "puzzle24", {}, {"answer": "(9 - 3) * 4 * 1", "question": "", "metadata": {"numbers": [9, 3, 4, 1]}}
    )
    answers = {"4 * (9 - 3) * 1": "correct", "4 * 1 * (9 - 3)": "correct", "24": "wrong", "(9 - 3) * 4": "wrong"}
    verdicts = pool.verify_many([(answer, gold) for answer in answers], kind=KIND, extract=())
    assert [v.status for v in verdicts] == list(answers.values()), verdicts
    total = problems("chain_sum", train_size=1, held_out_size=1).train[0]["answer"]
    stated = json.loads(total)["answer"]
    assert pool.verify(f"\\boxed{{1, {stated}, 3}}", total, kind=KIND).status == "wrong"
    assert pool.verify("\\boxed{1}", "no JSON", kind=KIND).status == "unparseable_gold"
