"""Held-out accuracy: greedy and avg@k, each with a standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kimi_rl.recipe import EvalSection
from kimi_rl.rewards import Verdict
from kimi_rl.rollout.engine import Completion, Request, SamplingParams
from kimi_rl.seeds import derive_seed

Generate = Callable[[Sequence[Request], SamplingParams], list[Completion]]
Verify = Callable[[Sequence[tuple[str, str]]], list[Verdict]]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on `n` held-out problems.

    `held_out_accuracy`: share of problems solved by greedy decoding; `held_out_se`: its binomial standard error.
    `avg_at_k`: mean accuracy of `k` samples a problem; `avg_at_k_se`: its standard error, clustered by problem.
    `truncated_share`, `no_answer_share`, `mean_length` (tokens): of the greedy completions.
    """

    n: int
    held_out_accuracy: float
    held_out_se: float
    truncated_share: float
    no_answer_share: float
    mean_length: float
    k: int
    avg_at_k: float | None = None
    avg_at_k_se: float | None = None

    def row(self) -> dict:
        return {key: value for key, value in asdict(self).items() if value is not None}


def clustered_mean(scores: np.ndarray) -> tuple[float, float]:
    """Mean of scores [n problems, k samples] and its standard error with problems as the independent units."""
    per_problem = scores.mean(axis=1)
    n = len(per_problem)
    spread = per_problem.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    return float(per_problem.mean()), float(spread)


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
        seed: of the avg@k samples; the same problems get the same seeds at every evaluation of a run.

    Returns:
        The figures, and one record per problem (greedy completion, verdict, share of the k samples solved).
    """
    count = min(section.limit or len(prompts), len(prompts))
    prompts, golds = prompts[:count], golds[:count]
    limit = section.max_tokens or max_tokens

    greedy = generate([Request(p, 0) for p in prompts], SamplingParams(limit, temperature=0.0))
    texts = [decode(c.token_ids) for c in greedy]
    verdicts = verify(list(zip(texts, golds, strict=True)))
    solved = np.array([[v.value or 0.0] for v in verdicts])
    accuracy, _ = clustered_mean(solved)

    average = error = None
    samples: np.ndarray | None = None
    if section.k:
        requests = [
            Request(p, derive_seed(seed, "eval", i, j)) for i, p in enumerate(prompts) for j in range(section.k)
        ]
        sampled = generate(requests, SamplingParams(limit, temperature=section.temperature))
        pairs = [(decode(c.token_ids), golds[i // section.k]) for i, c in enumerate(sampled)]
        samples = np.array([v.value or 0.0 for v in verify(pairs)]).reshape(count, section.k)
        average, error = clustered_mean(samples)

    figures = Evaluation(
        n=count,
        held_out_accuracy=accuracy,
        held_out_se=math.sqrt(accuracy * (1 - accuracy) / count),
        truncated_share=float(np.mean([c.finish_reason == "length" for c in greedy])),
        no_answer_share=float(np.mean([v.status == "no_answer" for v in verdicts])),
        mean_length=float(np.mean([len(c.token_ids) for c in greedy])),
        k=section.k,
        avg_at_k=average,
        avg_at_k_se=error,
    )
    records = [
        {
            "completion": texts[i],
            "gold": golds[i],
            "status": verdicts[i].status,
            "parsed": verdicts[i].parsed,
            "reason": verdicts[i].reason,
            "length": len(greedy[i].token_ids),
            "solved_share": None if samples is None else float(samples[i].mean()),
        }
        for i in range(count)
    ]
    return figures, records
