"""Triton kernels on a CPU: code in a process of its own, where they are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def interpreted(code: str, seed: int | None = None) -> str:
    """What `code` prints, with SEED in it replaced by `seed`. Fails with its traceback if it does."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code).replace("SEED", str(seed))],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"after {done.stdout.split()}: {done.stderr[-3000:]}"
    return done.stdout
