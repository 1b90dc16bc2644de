"""From curves to figures: paired differences of every arm from the reference, and the conclusion in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kimi_rl.compare.curves import AXES, StageCurves, same_problems
from kimi_rl.compare.statistics import Difference, area, first_crossing, paired_difference

Curves = dict[tuple[str, int], StageCurves]  # by arm and seed, of the compared stage

_UNITS = {"step": "steps", "tokens": "tokens", "seconds": "s"}
FIGURE_NAMES = {
    "auc": "mean held-out accuracy over the stage",
    "final": "held-out accuracy at the end",
    "gain": "gain in held-out accuracy over the stage",
}


def compare_arms(
    curves: Curves, arms: Sequence[str], reference: str, *, primary: str, thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    """One entry per arm other than `reference`: its figures, each a paired difference, and the conclusion.

    With several such arms the conclusions hold together (Bonferroni: each interval at 1 - 0.05 / arms); the figures'
    own intervals are at 95 %.
    """
    others = [arm for arm in arms if arm != reference]
    level = 1 - 0.05 / len(others)
    return [_compare(curves, arm, reference, primary, thresholds, level) for arm in others]


def _compare(
    curves: Curves, arm: str, reference: str, primary: str, thresholds: Sequence[float], level: float
) -> dict[str, Any]:
    seeds = [seed for name, seed in curves if name == reference and (arm, seed) in curves]
    ours = [curves[arm, seed] for seed in seeds]
    theirs = [curves[reference, seed] for seed in seeds]
    figures: list[dict[str, Any]] = []
    decided = None
    if seeds:
        matched = same_problems([*ours, *theirs])
        for key, name in FIGURE_NAMES.items():
            a, b = (np.stack([_accuracy_figure(stage, key, matched) for stage in side]) for side in (ours, theirs))
            figures.append(_figure(key, name, "accuracy", a, b))
            if key == primary:
                decided = paired_difference(a - b, level)
        figures += _sampled(ours, theirs)
        figures += [
            _time_to(ours, theirs, threshold, axis) for threshold in thresholds for axis in AXES
        ]
    return {
        "arm": arm,
        "reference": reference,
        "seeds": seeds,
        "figures": figures,
        "level": level,
        "decided": asdict(decided) if decided else None,
        "shown": bool(decided and decided.shown),
        "conclusion": conclusion(arm, reference, FIGURE_NAMES[primary], decided, level),
    }


def _accuracy_figure(stage: StageCurves, key: str, per_problem: bool) -> np.ndarray:
    """A figure of a run: [problems] where every problem's result is known, else a number."""
    values = stage.solved.astype(np.float64) if per_problem else stage.evals["held_out_accuracy"]
    if key == "auc":
        return area(stage.evals["step"], values)
    return values[..., -1] - (values[..., 0] if key == "gain" else 0.0)


def _figure(key: str, name: str, unit: str, ours: np.ndarray, theirs: np.ndarray, **more: Any) -> dict[str, Any]:
    return {
        "key": key,
        "name": name,
        "unit": unit,
        "arm_mean": float(ours.mean()),
        "reference_mean": float(theirs.mean()),
        **asdict(paired_difference(ours - theirs)),
        **more,
    }


def _sampled(ours: list[StageCurves], theirs: list[StageCurves]) -> list[dict[str, Any]]:
    """The last avg@k, where the runs sampled."""
    ends = [np.array([stage.evals["avg_at_k"][-1] for stage in side]) for side in (ours, theirs)]
    if np.isnan(ends).any():
        return []
    return [_figure("avg_at_k", "avg@k at the end", "accuracy", *ends)]


def _time_to(ours: list[StageCurves], theirs: list[StageCurves], threshold: float, axis: str) -> dict[str, Any]:
    """Steps, tokens or seconds until the held-out accuracy first reaches `threshold`.

    A run that never does counts with all it had. Such means are lower bounds, and their difference has no interval:
    what the run would have needed is not known.
    """
    values, reached = [], []
    for side in (ours, theirs):
        found = [first_crossing(stage.evals[axis], stage.evals["held_out_accuracy"], threshold) for stage in side]
        values.append(
            np.array([stage.evals[axis][-1] if x is None else x for stage, x in zip(side, found, strict=True)])
        )
        reached.append(sum(x is not None for x in found))
    more: dict[str, Any] = {"reached": {"arm": reached[0], "reference": reached[1], "of": len(ours)}}
    name = f"{axis if axis != 'step' else 'steps'} to {threshold:.0%} held-out accuracy"
    if min(reached) < len(ours):
        more |= {"interval": None, "se": None, "seeds_needed": None}
    return _figure(f"{axis}_to_{threshold:g}", name, _UNITS[axis], *values, **more)


def conclusion(arm: str, reference: str, figure: str, found: Difference | None, level: float) -> str:
    """One sentence or two that say what was shown, or that nothing was."""
    if found is None or found.pairs < 2:
        pairs = found.pairs if found else 0
        return (
            f"Nothing can be said about {arm} against {reference}: {pairs} complete pair{'s' * (pairs != 1)} of runs, "
            "at least 2 are needed."
        )
    value = f"{100 * found.value:+.1f} pp"
    if found.interval is None:
        why = f"all pairs differ by {value}, so there is no spread to judge by" if found.value else "they are equal"
        return f"No difference shown between {arm} and {reference} in {figure}: {why} ({found.pairs} pairs of seeds)."
    low, high = (f"{100 * end:+.1f}" for end in found.interval)
    smallest = ", the smallest possible" if found.p_value <= found.smallest_p * (1 + 1e-9) else ""
    evidence = (
        f"{value} ({100 * level:.3g} % interval {low} to {high} pp, {found.pairs} pairs of seeds, permutation "
        f"p = {found.p_value:.3g}{smallest})"
    )
    if found.shown:
        word = "higher" if found.value > 0 else "lower"
        return f"{arm} is {word} than {reference} in {figure}: {evidence}."
    text = f"No difference shown between {arm} and {reference} in {figure}: {evidence}."
    if found.seeds_needed:
        text += f" To show a true difference of the size seen, about {found.seeds_needed} pairs of seeds are needed."
    elif found.value:
        text += " More seeds alone would hardly show a difference of the size seen: it takes more problems."
    return text


def measured(curves: dict[tuple[str, int], dict[str, StageCurves]], arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each arm took, by stage: tokens/s, seconds and tokens, means over its runs with the spread (standard
    deviation) between them."""
    result: dict[str, dict[str, Any]] = {}
    for arm in arms:
        runs = [stages for (name, _), stages in curves.items() if name == arm]
        result[arm] = {}
        for stage in runs[0] if runs else ():
            columns = [stages[stage].train for stages in runs if len(stages[stage].train["seconds"])]
            totals = {
                "seconds": [c["seconds"][-1] for c in columns],
                "tokens": [c["tokens"][-1] for c in columns],
                "learner tokens/s": [np.median(c["learner_tokens_per_s"]) for c in columns
                                     if "learner_tokens_per_s" in c],
                "rollout tokens/s": [np.median(c["rollout_tokens_per_s"]) for c in columns
                                     if "rollout_tokens_per_s" in c],
            }  # fmt: skip
            result[arm][stage] = {
                name: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1)) if len(v) > 1 else None}
                for name, v in totals.items()
                if v
            }
    return result
