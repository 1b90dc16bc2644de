"""The command `kimi-rl convert`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

EPILOG = "Example: `kimi-rl convert HuggingFaceTB/SmolLM2-135M-Instruct --arch hybrid --out models/smollm2-hybrid`"


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A folder in Hugging Face layout, a hub id, or a .gguf file."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model; must be new or empty.")],
    arch: Annotated[str, typer.Option(help="`hybrid` (KDA and MLA layers) or `mla` (MLA only).")] = "hybrid",
    ratio: Annotated[
        str | None, typer.Option(metavar="N:1", help="KDA layers to one MLA layer in a hybrid. Default: 3:1.")
    ] = None,
    kv_lora_rank: Annotated[
        int | None,
        typer.Option(help="Size of MLA's latent. Default: 512, or the model's width where that is smaller."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Text to fit the layers on: a .jsonl file with `text`, or what a recipe's `data` takes (gsm8k, a "
            "file). Default: built-in procedural problems. Text like that of the training to come is better.",
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=2048, help="Tokens of it; a quarter only measures.")] = 8192,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """Turn a small Llama- or Qwen-style model into a Kimi Linear model, without training.

    Embeddings, norms, feed-forward layers and tokenizer are kept bit for bit. Each attention becomes a KDA or an MLA
    layer that starts from its weights; rotary positions are dropped. The result has lost most of what the source
    could do, and learns it back in `distill` stages; the table says how far off each layer starts. See docs/convert.md.
    """
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging

    from kimi_rl.convert.conversion import convert as run
    from kimi_rl.convert.report import print_report

    logging.disable_progress_bar()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        layers = bar.add_task("layers", total=None)
        report = run(
            source,
            out,
            arch=arch,
            ratio=ratio,
            rank=kv_lora_rank,
            calibration=calibration,
            tokens=calibration_tokens,
            seed=seed,
            command=" ".join(["kimi-rl", *sys.argv[1:]]),
            progress=lambda done, of: bar.update(layers, completed=done, total=of),
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        print_report(report, Console())
