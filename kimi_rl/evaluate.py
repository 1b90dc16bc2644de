"""Held-out accuracy: greedy, avg@k, pass@k and maj@k, each with a standard error and intervals."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kimi_rl.errors import RunError
from kimi_rl.recipe import EvalSection
from kimi_rl.rewards import Verdict
from kimi_rl.rollout.engine import Completion, Request, SamplingParams
from kimi_rl.seeds import derive_seed
from kimi_rl.statistics import Estimate, estimate, majority, pass_at_k

Generate = Callable[[Sequence[Request], SamplingParams], list[Completion]]
Verify = Callable[[Sequence[tuple[str, str]]], list[Verdict]]

_RIGHT = "\0right"  # no answer reads like this: control characters are refused
_MOST_SPELLINGS = 12  # pairs to compare grow with the square


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on `n` held-out problems.

    `held_out_accuracy`: share of problems solved by greedy decoding; `avg_at_k`: mean reward of `k` samples a problem;
    `pass_at_k`: chance that one of k is right; `maj_at_k`: chance that their most frequent answer is right. Each has
    `_se` (clustered by problem), `_interval` (95 %, the one to quote) and `_bootstrap` (95 %, percentiles over
    problems); see `kimi_rl.statistics`. `pass_at`: unbiased pass@j from the same samples, j = 1, 2, 4, ... below k.
    `truncated_share`, `no_answer_share`, `mean_length` (tokens): of the greedy completions; `sampled_...`: of the
    samples. `unmeasured`: problems left out of every figure, because their gold answer could not be read.
    """

    n: int
    held_out_accuracy: float
    held_out_se: float
    held_out_interval: tuple[float, float]
    held_out_bootstrap: tuple[float, float]
    truncated_share: float
    no_answer_share: float
    mean_length: float
    unmeasured: int
    k: int
    avg_at_k: float | None = None
    avg_at_k_se: float | None = None
    avg_at_k_interval: tuple[float, float] | None = None
    avg_at_k_bootstrap: tuple[float, float] | None = None
    pass_at_k: float | None = None
    pass_at_k_se: float | None = None
    pass_at_k_interval: tuple[float, float] | None = None
    pass_at_k_bootstrap: tuple[float, float] | None = None
    maj_at_k: float | None = None
    maj_at_k_se: float | None = None
    maj_at_k_interval: tuple[float, float] | None = None
    maj_at_k_bootstrap: tuple[float, float] | None = None
    pass_at: dict[str, float] | None = None
    sampled_truncated_share: float | None = None
    sampled_no_answer_share: float | None = None

    def row(self) -> dict:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class _Judged:
    """Completions of a list of requests, their texts and verdicts."""

    completions: list[Completion]
    texts: list[str]
    verdicts: list[Verdict]

    def part(self, problem: int, k: int) -> _Judged:
        """The k samples of one problem."""
        here = slice(problem * k, (problem + 1) * k)
        return _Judged(self.completions[here], self.texts[here], self.verdicts[here])

    def shares(self, prefix: str = "") -> dict[str, float]:
        return {
            f"{prefix}truncated_share": float(np.mean([c.finish_reason == "length" for c in self.completions])),
            f"{prefix}no_answer_share": float(np.mean([v.status == "no_answer" for v in self.verdicts])),
        }


def evaluate(
    generate: Generate,
    verify: Verify,
    prompts: Sequence[Sequence[int]],
    golds: Sequence[str],
    decode: Callable[[Sequence[int]], str],
    section: EvalSection,
    *,
    max_tokens: int,
    seed: int,
) -> tuple[Evaluation, list[dict]]:
    """Evaluate a policy.

    Args:
        generate, verify, decode: the rollout pool, the verifier, and token ids -> text.
        prompts: token ids of each problem. golds: its answer.
        seed: of the k samples; the same problems get the same seeds at every evaluation of a run.

    Returns:
        The figures, and one record per problem: greedy completion and verdict; of the k samples, the share solved
        (`solved_share`), how many were right (`correct_count`), each one's value and final answer, and the chance
        that their majority is right (`majority`).

    Raises RunError where no gold answer can be read.
    """
    count = min(section.limit or len(prompts), len(prompts))
    prompts, golds, k = prompts[:count], golds[:count], section.k
    limit = section.max_tokens or max_tokens

    def judge(requests: list[Request], temperature: float, wanted: Sequence[str]) -> _Judged:
        completions = generate(requests, SamplingParams(limit, temperature=temperature))
        texts = [decode(c.token_ids) for c in completions]
        return _Judged(completions, texts, verify(list(zip(texts, wanted, strict=True))))

    greedy = judge([Request(p, 0) for p in prompts], 0.0, golds)
    sampled = _Judged([], [], [])
    if k:
        requests = [Request(p, derive_seed(seed, "eval", i, j)) for i, p in enumerate(prompts) for j in range(k)]
        sampled = judge(requests, section.temperature, [gold for gold in golds for _ in range(k)])
    per_problem = [sampled.part(i, k) for i in range(count)]

    unread = {
        i
        for i in range(count)
        if any(v.status == "unparseable_gold" for v in (greedy.verdicts[i], *per_problem[i].verdicts))
    }
    measured = [i for i in range(count) if i not in unread]
    if not measured:
        raise RunError(f"evaluation: no gold answer can be read ({greedy.verdicts[0].reason}); is reward.kind right?")
    solved = np.array([greedy.verdicts[i].value or 0.0 for i in measured])
    figures = _named("held_out", estimate(solved, seed=seed), value_key="held_out_accuracy")

    majorities = _majorities(per_problem, verify) if k else []
    if k:
        values = np.array([[v.value or 0.0 for v in per_problem[i].verdicts] for i in measured])
        right = np.array([_correct_count(per_problem[i].verdicts) for i in measured])
        figures |= _named("avg_at_k", estimate(values.mean(axis=1), samples=k, seed=seed))
        figures |= _named("pass_at_k", estimate(pass_at_k(right, k, k), seed=seed))
        figures |= _named("maj_at_k", estimate(np.array([majorities[i] for i in measured]), seed=seed))
        powers = [2**e for e in range(k.bit_length()) if 2**e < k]
        figures["pass_at"] = {str(j): float(pass_at_k(right, k, j).mean()) for j in powers}
        figures |= sampled.shares("sampled_")

    records = [
        {
            "completion": greedy.texts[i],
            "gold": golds[i],
            "status": greedy.verdicts[i].status,
            "parsed": greedy.verdicts[i].parsed,
            "reason": greedy.verdicts[i].reason,
            "length": len(greedy.completions[i].token_ids),
            **_sample_columns(per_problem[i].verdicts, majorities[i] if k else None),
        }
        for i in range(count)
    ]
    mean_length = float(np.mean([len(c.token_ids) for c in greedy.completions]))
    return (
        Evaluation(
            n=len(measured), mean_length=mean_length, unmeasured=len(unread), k=k, **greedy.shares(), **figures
        ),
        records,
    )


def _named(name: str, found: Estimate, value_key: str | None = None) -> dict:
    return {
        value_key or name: found.value,
        f"{name}_se": found.se,
        f"{name}_interval": found.interval,
        f"{name}_bootstrap": found.bootstrap,
    }


def _correct_count(verdicts: Sequence[Verdict]) -> int:
    return sum(verdict.status == "correct" for verdict in verdicts)


def _sample_columns(verdicts: Sequence[Verdict], majority_right: float | None) -> dict:
    """What a record says about the k samples of its problem."""
    if not verdicts:
        return {"solved_share": None}
    values = [verdict.value or 0.0 for verdict in verdicts]
    return {
        "solved_share": float(np.mean(values)),
        "correct_count": _correct_count(verdicts),
        "sample_values": values,
        "sample_answers": [verdict.parsed for verdict in verdicts],
        "majority": majority_right,
    }


def _majorities(problems: Sequence[_Judged], verify: Verify) -> list[float]:
    """For each problem the chance that the most frequent answer is right, equal answers counted together.

    Right answers are one group, since each equals the gold answer. Wrong ones are grouped by spelling, and by the
    verifier where it could change the outcome: several spellings which together have as many votes as the right one.
    """
    labels = [[_label(verdict) for verdict in problem.verdicts] for problem in problems]
    places, pairs = [], []
    for i, problem in enumerate(problems):
        votes = Counter(label for label in labels[i] if label not in (None, _RIGHT))
        # An answer that hung or killed the verifier once is not tried on it again.
        steady = {label for label, v in zip(labels[i], problem.verdicts, strict=True) if v.status == "wrong"}
        spellings = [label for label, _ in votes.most_common() if label in steady][:_MOST_SPELLINGS]
        if len(spellings) < 2 or not 0 < labels[i].count(_RIGHT) <= votes.total():
            continue
        firsts = [labels[i].index(spelling) for spelling in spellings]
        for one, other in itertools.combinations(firsts, 2):
            places.append((i, one, other))
            pairs.append((problem.texts[other], labels[i][one]))
    for (i, one, other), verdict in zip(places, verify(pairs) if pairs else [], strict=True):
        if verdict.status == "correct":
            kept, gone = labels[i][one], labels[i][other]
            labels[i] = [kept if label == gone else label for label in labels[i]]
    return [majority(groups, _RIGHT) for groups in labels]


def _label(verdict: Verdict) -> str | None:
    """The group of a sample's answer: right, a spelling, or None without an answer (it has no vote)."""
    if verdict.status == "correct":
        return _RIGHT
    return None if verdict.parsed is None else " ".join(verdict.parsed.split())
