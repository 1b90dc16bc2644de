"""How perplexity, and what SFT makes of it, move with the tokens of distillation, from results of one or more calls."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_rl.report.charts import BLUE, GREY, ORANGE

COLOURS = {"hybrid": BLUE, "mla": ORANGE}
NAMES = {"hybrid": "hybrid", "mla": "all MLA"}
LINES = ("-", ":", "-.", "--")  # of an arm's first, second... way of being distilled
FIGURES = {"held_out_accuracy": "greedy", "avg_at_k": "mean of samples"}


@dataclass
class Curve:
    """An arm distilled from its conversion on, `steps` (a number for each call) of `batch_tokens`. `perplexity`:
    (tokens, of held-out text); `tuned`: tokens to the GSM8K scores after SFT of every seed, shares."""

    arm: str
    batch_tokens: int
    steps: list[int] = field(default_factory=list)
    perplexity: list[tuple[float, float]] = field(default_factory=list)
    tuned: dict[float, list[dict[str, float]]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{NAMES[self.arm]}, {' + '.join(map(str, self.steps))} steps of {self.batch_tokens:,}"


def curves(results: Sequence[dict[str, Any]]) -> list[Curve]:
    """Of results.json contents in the order of their calls: one that starts from a model of before goes on with its
    arm's last curve with steps of this size."""
    found: list[Curve] = []
    for result in results:
        starts = result["settings"].get("start") or {}
        for arm, kinds in result["distillation"].items():
            stage = kinds["logits"]
            if stage is None:
                continue
            size = stage["batch_tokens"]
            before = [curve for curve in found if (curve.arm, curve.batch_tokens) == (arm, size) and arm in starts]
            curve = before[-1] if before else Curve(arm, size)
            found += [] if before else [curve]
            curve.steps.append(stage["steps"])
            done = curve.perplexity[-1][0] if curve.perplexity else 0.0
            points = [(done + row["tokens"], row["student_perplexity"]) for row in stage["curve"]]
            curve.perplexity += points[1:] if done else points  # the first is the last of before
            scores = [sets["gsm8k"] for name, sets in result["scores"].items() if name.startswith(f"sft_{arm}_")]
            if scores:
                curve.tuned[curve.perplexity[-1][0]] = scores
    return found


def of_source(results: Sequence[dict[str, Any]]) -> tuple[float, dict[str, float]]:
    """The source's perplexity, and the mean of its GSM8K scores after the same SFT."""
    stages = (kinds["logits"] for result in results for kinds in result["distillation"].values() if kinds["logits"])
    rows = (row for stage in stages for row in stage["curve"])
    perplexity = next(row["teacher_perplexity"] for row in rows if row.get("teacher_perplexity"))
    scores = [
        sets["gsm8k"]
        for result in results
        for name, sets in result["scores"].items()
        if name.startswith("source_sft") and "gsm8k" in sets
    ]
    return perplexity, {key: sum(score[key] for score in scores) / len(scores) for key in FIGURES} if scores else {}


def plot(arguments: list[str]) -> None:
    """plot RESULTS... FILE.png: perplexity against tokens, and GSM8K after SFT for every seed."""
    parser = argparse.ArgumentParser(prog="plot")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("file", type=Path)
    args = parser.parse_args(arguments)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    draw(curves(results), *of_source(results), args.file)


def draw(found: Sequence[Curve], perplexity: float, tuned: dict[str, float], target: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    picture = Figure(figsize=(13.5, 4.0), layout="constrained")
    first, *others = picture.subplots(1, 1 + len(FIGURES))
    for place, curve in enumerate(found):
        number = sum(other.arm == curve.arm for other in found[:place])
        style = dict(color=COLOURS[curve.arm], linestyle=LINES[number % len(LINES)])
        tokens, values = zip(*curve.perplexity, strict=True)
        first.plot([x / 1e6 for x in tokens], values, marker="o", markersize=3, label=curve.label, **style)
        for axes, key in zip(others, FIGURES, strict=True):
            for at, scores in curve.tuned.items():
                axes.plot([at / 1e6] * len(scores), [score[key] for score in scores], "o", color=style["color"],
                          fillstyle="none" if number else "full", alpha=0.7)  # fmt: skip
            means = [sum(score[key] for score in scores) / len(scores) for scores in curve.tuned.values()]
            axes.plot([at / 1e6 for at in curve.tuned], means, **style)
    first.axhline(perplexity, color=GREY, linestyle="--", label="source")
    least = min(value for curve in found for _, value in curve.perplexity)
    # What a conversion begins with is so much higher that the rest would be one line.
    first.set(title="Perplexity of held-out math text", xlim=(0, None), ylim=(0.9 * least, 1.1 * perplexity))
    first.legend(fontsize=7, frameon=False, loc="center right")
    for axes, (key, name) in zip(others, FIGURES.items(), strict=True):
        if key in tuned:
            axes.axhline(tuned[key], color=GREY, linestyle="--")
        axes.set(title=f"GSM8K after SFT, {name}", ylim=(0, None), xlim=(0, None))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (first, *others):
        axes.set_xlabel("million tokens of distillation")
        axes.grid(alpha=0.25)
    picture.savefig(target, dpi=110)
