"""Helpers for tests that start whole runs as a user would: the command line in a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]

SMALL = {
    "name": "small",
    "model": {"arch": "hybrid", "size": "tiny"},
    "data": {"task": "arithmetic", "params": {"level": 1}, "train_size": 400, "held_out_size": 16},
    # Random models are never right, and equal rewards teach nothing: a stand-in that varies with the completion.
    "reward": {"kind": "stand_in_reward:parity", "extract": []},
    "stages": [
        {"kind": "sft", "steps": 6, "batch_size": 8, "checkpoint_every": 3, "max_length": 128,
         "rollout": {"engine": "transformers", "max_tokens": 16}},
        {"kind": "rlvr", "steps": 6, "prompts_per_step": 4, "group_size": 4, "learning_rate": 1.0e-3,
         "checkpoint_every": 2, "scale_rewards": "none",
         "rollout": {"engine": "transformers", "max_tokens": 16},
         # All that has a state which a resume must bring back.
         "loss_type": "k15", "tau": 0.2, "prompt_order": "prioritized", "dynamic_sampling": {"max_rounds": 1},
         "updates_per_step": 2, "micro_batch_size": 4, "ptx": {"batch_size": 4},
         "update_control": {"max": 4, "calm_steps": 2, "max_kl": 10.0}, "kl_control": {"target": 0.01}},
    ],
}  # fmt: skip


def write_recipe(folder: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def command(*args) -> list[str]:
    return [sys.executable, "-m", "kimi_rl.cli", *map(str, args)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}


def start(*args) -> subprocess.Popen:
    return subprocess.Popen(
        command(*args),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*args, timeout=400) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), env=environment(), capture_output=True, text=True, timeout=timeout)


def run_inside(*args) -> subprocess.CompletedProcess:
    """The command in this process, whose imports are paid for: for what ends before a model loads."""
    from unittest import mock

    from kimi_rl.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["kimi-rl", *map(str, args)]),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the last line, still being written
    return rows


def train_steps(out: Path, stage: str) -> list[int]:
    return [row["step"] for row in metrics(out) if row["type"] == "train" and row["stage"] == stage]


def wait_for(condition, timeout=240, process=None, pause=0.05):
    """Poll until `condition()` is truthy and return it; fail with the process's output if it ends before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before the condition held:\n{process.stdout.read()}")
        time.sleep(pause)
    raise AssertionError("the condition did not come to hold in time")


def processes_named(name: str, parent: subprocess.Popen) -> list[psutil.Process]:
    """Ray actors of the run started as `parent` whose title holds `name`."""
    found = []
    for child in psutil.Process(parent.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(name in part for part in child.cmdline()):
                found.append(child)
    return found


def kill_session(process: subprocess.Popen, actors: bool = False) -> None:
    """`kill -9` of the whole process group, and wait until the actors it leaves are gone too.

    Ray's actors lie in groups of their own and end some seconds later; `actors`: they are killed along with it.
    """
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for actor in family if actors else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            actor.kill()
    process.wait()
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, f"left behind: {alive}"
