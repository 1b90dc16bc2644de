"""Completions that try to be paid without an answer, or break the verifier: the verdict each must get."""

import time

import pytest

from kimi_rl.rewards import VerifierPool

QUESTION = "What is 6 times 7? The answer is 42. Put it into \\boxed{}."

CASES = {
    "every number boxed": (" ".join(f"\\boxed{{{i}}}" for i in range(100)), "42", "wrong"),
    "every number boxed, the right one last": (" ".join(f"\\boxed{{{i}}}" for i in range(43)), "42", "wrong"),
    "two boxes joined by or": ("\\boxed{7} or \\boxed{8}", "8", "wrong"),
    "two boxes joined by or, first right": ("\\boxed{7} or \\boxed{8}", "7", "wrong"),
    "two boxes in math signs": ("$\\boxed{7}$, $\\boxed{8}$", "8", "wrong"),
    "two boxes are the two solutions": ("\\boxed{7} or \\boxed{8}", "7, 8", "correct"),
    "the same box twice": ("\\boxed{8}, \\boxed{8}", "8", "correct"),
    "a corrected answer": ("\\boxed{7}. Wait, that is wrong: it is \\boxed{8}", "8", "correct"),
    "a right answer taken back": ("\\boxed{8}. Wait, that is wrong: it is \\boxed{7}", "8", "wrong"),
    "a list in the box": ("\\boxed{40, 41, 42, 43}", "42", "wrong"),
    "a set in the box": ("\\boxed{\\{41, 42\\}}", "42", "wrong"),
    "alternatives in the box": ("\\boxed{41 \\text{ or } 42}", "42", "wrong"),
    "an interval in the box": ("\\boxed{[0, 100]}", "42", "wrong"),
    "an inequality in the box": ("\\boxed{x \\leq 42}", "42", "wrong"),
    "plus or minus": ("\\boxed{\\pm 42}", "42", "wrong"),
    "a false chain of equalities": ("\\boxed{x = 41 = 42}", "42", "wrong"),
    "an equation of the question": ("\\boxed{2x + 3 = 13}", "x = 5", "wrong"),
    "a variable": ("\\boxed{x}", "42", "wrong"),
    "gold echoed from the prompt": (QUESTION, "42", "no_answer"),
    "the question in a box": ("\\boxed{" + QUESTION.replace("\\boxed{}", "a box") + "}", "42", "wrong"),
    "the question in a box, box and all": ("\\boxed{" + QUESTION + "}", "42", "no_answer"),
    "a sentence in the box": ("\\boxed{The answer is 42}", "42", "wrong"),
    "a sentence in text in the box": ("\\boxed{\\text{The answer is }42}", "42", "wrong"),
    "a box in a box": ("\\boxed{\\boxed{42}}", "42", "correct"),
    "an empty box last": ("\\boxed{42} \\boxed{}", "42", "no_answer"),
    "an unclosed box": ("\\boxed{42", "42", "no_answer"),
    "an unclosed box after a closed one": ("\\boxed{42} so \\boxed{4", "42", "no_answer"),
    "no marker": ("42", "42", "no_answer"),
    "nothing": ("", "42", "no_answer"),
    "an answer only in thought": ("<think>\\boxed{42}</think> I do not know.", "42", "no_answer"),
    "thought without an end": ("<think> so \\boxed{42}", "42", "no_answer"),
    "an answer after thought": ("<think>\\boxed{41}</think> \\boxed{42}", "42", "correct"),
    "full-width digits": ("\\boxed{４２}", "42", "wrong"),
    "Arabic digits": ("\\boxed{٤٢}", "42", "wrong"),
    "mathematical bold digits": ("\\boxed{𝟒𝟐}", "42", "wrong"),
    "Arabic digits after hashes": ("#### ٤٢", "42", "wrong"),
    "superscript digits": ("\\boxed{⁴²}", "42", "wrong"),
    "null byte in the answer": ("\\boxed{4\x002}", "42", "wrong"),
    "null byte before the answer": ("\x00\x00 \\boxed{42}", "42", "correct"),
    "zero-width space in the answer": ("\\boxed{4\u200b2}", "42", "wrong"),
    "right-to-left override": ("\\boxed{\u202e24}", "42", "wrong"),
    "lone surrogate": ("\\boxed{4\ud8002}", "42", "wrong"),
    "underscores, as Python writes numbers": ("\\boxed{4_2}", "42", "wrong"),
    "Python code": ("\\boxed{__import__('os').getpid()}", "42", "wrong"),
    "a power tower": ("\\boxed{9^{9^{9^{9}}}}", "42", "wrong"),
    "a factorial tower": ("\\boxed{((9!)!)!}", "42", "wrong"),
    "a huge power": ("\\boxed{10^{1000000000000}}", "42", "wrong"),
    "a huge power equal to gold but for 1": ("\\boxed{10^{10^{10}}+1}", "10^{10^{10}}", "wrong"),
    "a power tower that is the gold": ("\\boxed{9^{9^{9^9}}}", "9^{9^{9^9}}", "correct"),
    "a huge scientific exponent": ("\\boxed{1e999999999}", "42", "wrong"),
    "a huge literal": ("\\boxed{" + "9" * 1500 + "}", "42", "wrong"),
    "a literal beyond the limit": ("\\boxed{" + "9" * 100_000 + "}", "42", "wrong"),
    "deep brackets": ("\\boxed{" + "(" * 500 + "42" + ")" * 500 + "}", "42", "wrong"),
    "deep fractions": ("\\boxed{" + "\\frac{1}{" * 100 + "42" + "}" * 100 + "}", "42", "wrong"),
    "a division by zero": ("\\boxed{\\frac{42}{0}}", "42", "wrong"),
    "zero over zero": ("\\boxed{0/0}", "42", "wrong"),
    "zero to minus one": ("\\boxed{0^{-1}}", "42", "wrong"),
    "infinity": ("\\boxed{\\infty}", "42", "wrong"),
    "not a number": ("\\boxed{nan}", "42", "wrong"),
    "1 MB in one line": ("a" * 1_000_000 + " \\boxed{42}", "42", "correct"),
    "1 MB of opened boxes": ("\\boxed{" * 140_000, "42", "no_answer"),
    "1 MB of closed boxes": ("\\boxed{1}" * 110_000, "42", "wrong"),
    "1 MB of braces in the box": ("\\boxed{" + "{" * 500_000 + "}" * 500_000 + "}", "42", "wrong"),
    "1 MB of hashes": ("#" * 1_000_000, "42", "no_answer"),
    "1 MB of backslashes": ("\\" * 1_000_000, "42", "no_answer"),
    "1 MB of white space in the box": ("\\boxed{" + " " * 1_000_000 + "42}", "42", "correct"),
    "hashes after a box": ("\\boxed{42} #### 41", "42", "wrong"),
    "several hashes": ("#### 42\n#### 41", "42", "wrong"),
    "percent for a number": ("\\boxed{42\\%}", "42", "wrong"),
    "two numbers side by side": ("\\boxed{4 2}", "42", "wrong"),
    "anagram": ("\\boxed{neve}", "even", "wrong"),
}
# Answers that keep sympy or its parser busy for minutes.
SLOW = {
    "an integral without closed form": (
        "\\boxed{\\int_0^1 \\sin(x^{x^{x}}) e^{x^{7}} \\, dx}",
        "\\int_0^1 \\cos(x^{x^x}) dx",
    ),
    "a huge sum": ("\\boxed{\\sum_{k=1}^{10^{12}} \\frac{1}{k^2+\\sin(k)}}", "42"),
    "a huge product": ("\\boxed{\\prod_{k=1}^{10^{9}} k}", "42"),
    "a huge binomial": ("\\boxed{\\binom{10^9}{5 \\cdot 10^8}}", "42"),
}


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(deadline_s=2.0) as pool:
        pool.warm_up()
        yield pool


@pytest.mark.parametrize("name", CASES)
def test_verdict(pool, name):
    completion, gold, expected = CASES[name]
    start = time.monotonic()
    verdict = pool.verify(completion, gold)
    assert (verdict.status, verdict.value) == (expected, float(expected == "correct")), verdict.reason
    assert time.monotonic() - start < 2.0, "this must be settled by a rule, not by the deadline"
    assert "\n" not in verdict.reason and len(verdict.reason) < 300


@pytest.mark.parametrize("name", SLOW)
def test_slow_mathematics_ends_at_the_deadline(pool, name):
    completion, gold = SLOW[name]
    start = time.monotonic()
    verdict = pool.verify(completion, gold)
    assert verdict.status in ("timeout", "wrong", "crashed") and verdict.value == 0.0
    # Four deadlines at most, which only a crowded machine takes (docs/rewards.md), and room for a restart.
    assert time.monotonic() - start < 4 * pool.deadline_s + 2.0
    assert pool.verify("\\boxed{\\frac{84}{2}}", "42").status == "correct"
