"""Overlap of training and evaluation problems: exact, near and variant, and what must not be found."""

import random
from pathlib import Path

import pytest

from kimi_rl.dataset import load_problems
from kimi_rl.dataset.overlap import find_overlap, fingerprint, summarize
from kimi_rl.recipe import DataSection

SHARED = Path(__file__).parents[1] / "../shared/data"
PROBLEM = (
    "An ellipse in the first quadrant is tangent to both the $x$-axis and $y$-axis. One focus is at $(3,7)$, "
    "and the other focus is at $(d, 7)$. Compute $d$."
)


def rows(*texts: str) -> list[dict]:
    return [{"id": str(number), "question": text} for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    "one,other",
    [
        ("Find $x^{2}+1$.", "find  $x^2 + 1.$"),
        (r"$\dfrac{1}{2} \cdots \left( a \right)$", r"$\frac12 \dots (a)$"),
        (r"Is $a \leq b$ \quad or $\text{none}$?", r"Is $a \le b$ or none"),
        ("$3 − 2$", "3-2"),
    ],
)
def test_fingerprint_ignores_how_a_problem_is_set(one, other):
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize(
    "one,other", [("x+1", "x-1"), ("x^2", "x2"), ("a<b", "a>b"), ("12", "1/2"), ("?", "!!")]
)
def test_fingerprint_keeps_what_a_problem_says(one, other):
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    "text,kind",
    [
        (PROBLEM, "exact"),
        (PROBLEM.replace(". ", ".  ").replace("$(d, 7)$.", "$(d,7).$"), "exact"),
        (PROBLEM.replace("Compute", "What is the value of"), "near"),
        ("Consider this. " + PROBLEM, "near"),
        (PROBLEM.replace("(3,7)", "(3,8)"), "variant"),
    ],
)
def test_kinds(text, kind):
    noise = [f"Tom has {n} apples and eats {n % 3} of them. How many are left?" for n in range(20)]
    found = find_overlap(rows(*noise, text), rows("Something else entirely, of some length?", PROBLEM))
    assert [(o.held_out_id, o.train_id, o.kind) for o in found] == [("1", "20", kind)]
    assert (found[0].similarity == 1) == (kind == "exact") and found[0].similarity >= 0.75


def test_a_sign_makes_another_problem():
    text = "What is the smallest positive $n$ such that all the roots of $z^4 + z^2 + 1 = 0$ are $n$th roots?"
    found = find_overlap(rows(text.replace("4 + z", "4 - z")), rows(text))
    assert [o.kind for o in found] == ["near"]


def test_most_similar_training_problem_is_named():
    found = find_overlap(rows(PROBLEM.replace("(3,7)", "(3,8)"), PROBLEM, "Note: " + PROBLEM), rows(PROBLEM))
    assert [(o.train_id, o.kind) for o in found] == [("1", "exact")]


def test_unrelated_problems_with_common_phrases_do_not_overlap():
    draw = random.Random(0)
    nouns = ["apples", "pears", "books", "stamps", "marbles", "coins", "tickets", "roses", "bricks"]
    names = ["Tom", "Ann", "Raj", "Mia", "Lee", "Zoe", "Sam", "Ivy"]

    def problem():
        name, noun, other = draw.choice(names), draw.choice(nouns), draw.choice(nouns)
        return f"{name} bought {draw.randrange(99)} {noun} for a friend who sold {other}. How many are left?"

    train, held_out = (
        rows(*(problem() for _ in range(50))),
        rows("How many are left?", "Find the sum of the roots."),
    )
    assert find_overlap(train, held_out) == []


def test_threshold():
    changed = rows(PROBLEM.replace("Compute", "What is the value of"))
    similarity = find_overlap(changed, rows(PROBLEM))[0].similarity
    assert find_overlap(changed, rows(PROBLEM), threshold=similarity + 0.01) == []
    with pytest.raises(ValueError, match="threshold"):
        find_overlap([], [], threshold=0)


def test_summary():
    found = find_overlap(rows(PROBLEM), rows(PROBLEM, PROBLEM.replace("(3,7)", "(3,8)")))
    assert summarize(found) == (
        "2 held-out problems overlap the training problems: 1 exact, 1 variant; "
        "0 = 0 (exact), 1 = 0 (variant)"
    )
    assert summarize([]) == ""


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_olympiadbench_rows_that_are_math_training_problems():
    def held_out(name):
        return load_problems(DataSection(path=str(SHARED / name)), evaluation=True).held_out

    train = [*held_out("math/train.jsonl"), *held_out("math/train12k_extra.jsonl")]
    found = {o.held_out_id: (o.train_id, o.kind) for o in find_overlap(train, held_out("olympiadbench"))}
    # The three that letters and digits alone give away, and those that need the LaTeX read.
    assert found["2791"] == ("train/4487", "exact")
    assert found["2890"] == ("train/3443", "exact")
    assert found["2713"] == ("test/4640", "exact")
    exact = {number for number, (_, kind) in found.items() if kind == "exact"}
    assert exact == {"2791", "2890", "2713", "2644", "2895", "2918"}
    assert found.keys() - exact == {"2607", "2794"}
