"""What a conversion cost, before any training: `convert.json` in the folder, and a table for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kimi_rl.run_dir import atomic_write_text, describe_environment


def write_report(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Write `convert.json` with versions and machine added; returns what it holds."""
    whole = {"out": str(folder), **report, "environment": describe_environment()}
    atomic_write_text(folder / "convert.json", json.dumps(whole, indent=2) + "\n")
    return whole


def print_report(report: dict[str, Any], console: Console) -> None:
    table = Table(title="Attention output on calibration text that no fit has seen, before any training")
    table.add_column("layer", justify="right")
    table.add_column("kind")
    table.add_column("error with\no copied", justify="right")
    table.add_column("error with\no refitted", justify="right")
    table.add_column("start")
    for row in report["layers"]:
        table.add_row(
            str(row["layer"]), row["kind"], f"{row['error_copied']:.3f}", f"{row['error']:.3f}", _start(row)
        )
    console.print(table)
    console.print(
        "error: share of the power of the source's output that is missed; 0 equal, 1 as bad as zeros\n"
        "half-lives: tokens, fastest and slowest channel; rank: power of keys and values that the latent leaves out; "
        "size: spread of the latent's norm"
    )
    before, after = report["parameters"]["source"], report["parameters"]["converted"]
    console.print(f"parameters: {before:,} in the source, {after:,} converted")
    perplexity = report["perplexity"]
    source, converted = perplexity["source"], perplexity["converted"]
    console.print(f"perplexity of the same text: source {source:.2f}, converted {converted:.2f}")
    if not report["chat_template_marked"]:
        console.print(
            "note: the chat template is of an unknown form and got no {% generation %} marks; an sft stage then learns "
            "all that it writes behind a prompt",
            markup=False,
        )
    console.print(f"written: {report['out']} (with convert.json)", markup=False)


def _start(row: dict[str, Any]) -> str:
    if row["kind"] == "mla":
        return f"rank loses {row['rank_lost']:.1%}, size ±{row['latent_size_spread']:.1%}"
    start = row["start"]
    return f"half-lives {start['fastest']:g}-{start['slowest']:g}, beta logit {start['beta_logit']:g}"
