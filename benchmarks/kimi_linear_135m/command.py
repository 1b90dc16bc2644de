"""The figures of Kimi Linear 135M from their beginning: conversion, distillation, SFT, RLVR and all scores.

    python benchmarks/kimi_linear_135m --source FOLDER_OR_GGUF --gsm8k FOLDER --math FOLDER --svamp FOLDER \\
        --math500 FOLDER --out DIR --minutes 40 --cards 0,1,2,3
    python benchmarks/kimi_linear_135m --status DIR
    python benchmarks/kimi_linear_135m plot RESULTS.json... CURVES.png

Where --source or data are left out, they are the recipes' hub ids. The same command again goes on where the last one
stopped: finished steps are kept, a training run that was cut off goes on from its last checkpoint, failed steps are
tried again. DIR holds state.json, logs/NAME.log, results.json and compare/compare.html in the end.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kimi_linear_135m.graph import LAYERS_SHARE, NAME, PARTS, RESULTS_S, STAGES, Planner, Settings, check_settings
from kimi_linear_135m.results import score_lines, scores, write_results
from kimi_linear_135m.scheduler import Card, Scheduler, launch, read_state
from kimi_rl.errors import InputError, one_line
from kimi_rl.kernels.compile_cache import cache_environment
from kimi_rl.run_dir import RunDir, only_one, usable_cores

SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = {"gsm8k": "openai/gsm8k", "math": "EleutherAI/hendrycks_math", "svamp": "ChilleD/SVAMP",
        "math500": "HuggingFaceH4/MATH-500"}  # fmt: skip
WORKERS = ("source", "check", "probe", "sample", "score")
# As in the first call.
LASTING = ("source", "start", "data", "threads", "engine", "layers_share", "k", "max_tokens", "limit", "overrides")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments and arguments[0] == "plot":
            from kimi_linear_135m.plot import plot

            plot(arguments[1:])
            return 0
        if arguments and arguments[0] in WORKERS:
            from kimi_linear_135m import workers

            getattr(workers, arguments[0])(arguments[1:])
            return 0
        args = parse(arguments)
        if args.status is not None:
            print("\n".join(status_lines(args.status)))
            return 0
        if args.out is None:
            raise InputError("--out: give the folder for all that is made")
        settings = make_settings(args)
        if args.results_only:
            return write_and_tell(settings)
        with only_one(settings.out, "another call works there"):
            return run(settings, arguments, plan_only=args.plan)
    except InputError as error:
        print(f"Error: {one_line(error, 600)}", file=sys.stderr)
        return 2


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/kimi_linear_135m",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", default=SOURCE, help="folder in Hugging Face layout, .gguf file, or hub id")
    for name, hub_id in DATA.items():
        parser.add_argument(f"--{name}", default=hub_id, help="folder with train.jsonl and test.jsonl, or a hub id")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=40.0, help="that this call may take; the plan fills them")
    parser.add_argument("--cards", help="as in CUDA_VISIBLE_DEVICES: 0,1; `cpu`: none. Default: all")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--arms", default="hybrid,mla")
    parser.add_argument("--threads", type=int, help="of each process. Default: a quarter of the cores, at most 12")
    parser.add_argument(
        "--learners", type=int, help="cards that an arm is distilled on, with rows of their own. Default: cards / arms"
    )
    parser.add_argument("--until", choices=STAGES, default="rlvr")
    parser.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--sample-seconds", type=float, default=90.0, help="of sampling from the source; 0: none")
    parser.add_argument("--sample-skip", type=int, default=0, help="solutions that an earlier distillation had already")
    parser.add_argument(
        "--layers-share", type=float, default=LAYERS_SHARE, help="of the time for a `layers` stage first. Default: none"
    )
    parser.add_argument("--k", type=int, default=4, help="samples a problem in every score")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer in every score")
    parser.add_argument("--limit", type=int, help="score the first N problems of each set")
    parser.add_argument(
        "--scores", action=argparse.BooleanOptionalAction, default=True, help="--no-scores: a later call measures them"
    )
    parser.add_argument(
        "--start", action="append", default=[], metavar="ARM=FOLDER",
        help="the model to distil, converted or distilled before, in place of a conversion",
    )  # fmt: skip
    parser.add_argument(
        "--source-too", action=argparse.BooleanOptionalAction, default=True, help="SFT and scores of the source itself"
    )
    parser.add_argument("--status", type=Path, metavar="DIR", help="a line for each step, and the newest figures")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument("--results-only", action="store_true", help="write results.json of what there is, and stop")
    parser.add_argument(
        "overrides", nargs="*", metavar="PART:KEY=VALUE", help=f"overrides of the recipes; PART: {', '.join(PARTS)}"
    )
    return parser.parse_intermixed_args(arguments)


# --- settings ---------------------------------------------------------------------------------------------------


def make_settings(args: argparse.Namespace) -> Settings:
    """What was asked for, with what a former call in the same folder fixed. Raises InputError."""
    out = args.out.expanduser().resolve()
    cores = usable_cores()
    old = read_state(out)
    before = old.get("settings", {})
    cards, arms = find_cards(args.cards), tuple(_list(args.arms, "--arms", ("hybrid", "mla")))
    learners = args.learners or max(1, len(cards) // len(arms))
    if learners > len(cards):
        raise InputError(f"--learners {learners}: more than the {len(cards)} cards; give more cards or fewer learners")
    settings = Settings(
        source=local(args.source), data={name: local(getattr(args, name)) for name in DATA}, out=out,
        minutes=args.minutes, cards=cards, cores=cores, learners=learners,
        threads=args.threads or before.get("threads") or max(1, min(12, cores // 4)),
        arms=arms,
        seeds=tuple(int(word) for word in _list(args.seeds, "--seeds")), until=args.until, engine=args.engine,
        sample_s=args.sample_seconds, sample_skip=args.sample_skip, layers_share=args.layers_share,
        k=args.k, max_tokens=args.max_tokens, limit=args.limit, scores=args.scores,
        start=split_start(args.start, arms), source_too=args.source_too,
        overrides=split_overrides(args.overrides), kept=old,
    )  # fmt: skip
    for key in ("steps", "started", "seconds", "cards"):
        settings.kept.pop(key, None)  # the scheduler's own
    now = {key: getattr(settings, key) for key in LASTING}
    for key in LASTING:
        was = before.get(key)
        if before and was != now[key]:
            raise InputError(f"--out {out}: was begun with {key} {was!r}, now {now[key]!r}; take a new folder")
    settings.kept["settings"] = now
    check_settings(settings)
    return settings


def local(path: str) -> str:
    """Where it is a file or folder here: absolute, since steps run elsewhere."""
    place = Path(path).expanduser()
    if place.exists():
        return str(place.resolve())
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise InputError(f"{path}: no such file or folder")
    return path


def split_overrides(words: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in words:
        part, colon, override = word.partition(":")
        if not colon or part not in PARTS or "=" not in override:
            raise InputError(f"{word!r}: expected PART:KEY=VALUE with one of {', '.join(PARTS)}")
        found.setdefault(part, []).append(override)
    return found


def split_start(words: Sequence[str], arms: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        arm, equal, folder = word.partition("=")
        if not equal or arm not in arms or arm in found:
            raise InputError(f"--start {word!r}: expected ARM=FOLDER, each of {', '.join(arms)} at most once")
        found[arm] = local(folder)
    return found


def _list(text: str, where: str, known: Sequence[str] | None = None) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    bad = [word for word in words if (word not in known if known else not word.isdigit())]
    if bad or not words or len(set(words)) != len(words):
        wanted = f"some of {', '.join(known)}" if known else "whole numbers"
        raise InputError(f"{where} {text!r}: give {wanted}, each once")
    return words


def find_cards(asked: str | None) -> list[Card]:
    """The cards asked for, or all; one that stands for the CPU where there are none."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES") if asked is None else asked
    rows = {words[0]: Card(words[0], words[1], float(words[2]) / 1024) for words in _smi("index,name,memory.total")}
    if asked is None:
        return list(rows.values()) or [Card("")]
    ids = [word.strip() for word in asked.split(",") if word.strip()]
    if ids in ([], ["cpu"]):
        return [Card("")]
    return [rows.get(card) or Card(card, "unknown card", 79.0) for card in ids]


def _smi(fields: str) -> list[list[str]]:
    """Rows of nvidia-smi; none where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[word.strip() for word in line.split(",")] for line in text.strip().splitlines()]


# --- a call -----------------------------------------------------------------------------------------------------


def run(settings: Settings, arguments: list[str], plan_only: bool = False) -> int:
    """Plan, run, write what came out. Returns the exit code: 0 where all is done."""
    planner, started = Planner(settings), time.time()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 65536 if most == resource.RLIM_INFINITY else min(most, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))  # a Ray for each training process
    words = shlex.join(["python", NAME, *arguments])
    settings.kept["command"] = words
    scheduler = Scheduler(
        planner.steps(), settings.cards, settings.slots, settings.out, 60 * settings.minutes - RESULTS_S,
        environment=environment(settings), notes=settings.kept, launch=launch,
        say=lambda text: print(text, flush=True),
    )  # fmt: skip
    planner.scheduler, done = scheduler, scheduler.names("done")
    tell_plan(planner)
    if plan_only:
        return 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the steps as well
    try:
        whole = scheduler.run()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if len(done) < len(scheduler.steps):
        call = {"command": words, "seconds": time.time() - started, "cards": [card.name for card in settings.cards]}
        settings.kept.setdefault("calls", []).append(call)
        scheduler.save()
    failed = write_and_tell(settings)
    for name in scheduler.names("failed", "stopped", "blocked"):
        print(f"  {name}: {scheduler.records[name].status}: {scheduler.records[name].error}")
    return failed or (0 if whole else 1)


def environment(settings: Settings) -> dict[str, str]:
    """Of every step: cards are ours to give, not a Ray cluster's; kernels are compiled once for all, engines too."""
    found = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    cache = found.setdefault("KIMI_RL_KERNEL_CACHE", str(settings.out / "kernel_cache"))
    return found | cache_environment(cache) | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def tell_plan(planner: Planner) -> None:
    settings, scheduler = planner.settings, planner.scheduler
    times = planner.outlook()
    cards = ", ".join(f"{card.id} ({card.name})" for card in settings.cards if card.id) or "none"
    sizes = f"at most {settings.slots} processes of {settings.threads} threads"
    print(f"{settings.minutes:g} minutes, cards: {cards}, {sizes}")
    done = scheduler.names("done")
    if done:
        print(f"done already: {', '.join(done)}")
    for name, (begin, end) in sorted(times.items(), key=lambda item: item[1]):
        print(f"  {begin:5.0f} to {end:5.0f} s  {name}")
    end = max((end for _, end in times.values()), default=0.0)
    if end > scheduler.time_left():
        print(f"This will take about {(end + RESULTS_S) / 60:.0f} minutes, more than --minutes gives it: what is cut")
        print("off goes on when the same command is given again.")


def write_and_tell(settings: Settings) -> int:
    """results.json and the comparison."""
    cwd = Path.cwd()
    os.chdir(settings.out)  # models in recipes are named from there
    try:
        path = write_results(settings)
        print("\n".join([*score_lines(scores(settings.out)), f"results: {path}"]))
        return 0
    finally:
        os.chdir(cwd)


# --- status -----------------------------------------------------------------------------------------------------


def status_lines(folder: Path) -> list[str]:
    """A line for each step, with the newest figures of what trains; then the scores and the cards."""
    state = read_state(folder)
    if not state:
        raise InputError(f"--status {folder}: no state.json there")
    now = time.time() - state["started"]
    lines = [f"{now:.0f} s since the start of the last call, which had {state['seconds']:.0f}"]
    for name, row in state["steps"].items():
        text = f"{name}: {row['status']}"
        if row["status"] == "running":
            where = f" on card {row['card']}" if row["card"] else ""
            text += f"{where} for {now - row['began']:.0f} s of about {row['estimate']:.0f}"
        elif row["seconds"]:
            text += f", {row['seconds']:.0f} s"
        text += f": {row['error']}" if row["error"] else ""
        lines.append(text + newest_figures(folder, row))
    lines += score_lines(scores(folder))
    rows = _smi("index,utilization.gpu,memory.used")
    cards = [f"{card} {busy} %, {float(used) / 1024:.0f} GiB" for card, busy, used in rows]
    return lines + ([f"cards: {'; '.join(cards)}"] if cards else [])


def newest_figures(folder: Path, row: dict[str, Any]) -> str:
    """Of a step that trains: its stage, step and last figures."""
    command = row["command"]
    if "--out" not in command or "train" not in command:
        return ""
    rows = RunDir(folder / command[command.index("--out") + 1]).read_metrics()
    train = next((r for r in reversed(rows) if r["type"] == "train"), None)
    held = next((r for r in reversed(rows) if r["type"] == "eval"), None)
    text = ""
    if train:
        text = f"; {train['stage']} {train['step']}/{train['steps_total']}"
        keys = ("loss", "reward", "layer_error_mean", "kl_to_teacher", "step_s", "tokens_per_s", "completion_length")
        text += "".join(f" {key} {train[key]:.4g}" for key in keys if train.get(key) is not None)
    if held:
        keys = ("held_out_accuracy", "avg_at_k", "student_perplexity", "teacher_perplexity")
        text += f"; at step {held['step']}"
        text += "".join(f" {key} {held[key]:.4g}" for key in keys if held.get(key) is not None)
    return text
