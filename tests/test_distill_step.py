"""`benchmarks/distill_step.py` at a tiny size: every arm runs, and computes the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIZES = {
    "layers": 4, "width": 32, "heads": 2, "groups": 1, "feed-forward": 48, "vocabulary": 100, "layers-tokens": 256,
    "logits-tokens": 128, "text-tokens": 30, "max-length": 64, "steps": 2, "warm": 1,
}  # fmt: skip


def test_the_benchmark_of_a_step(tmp_path):
    out = tmp_path / "found.json"
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    subprocess.run(
        [sys.executable, "benchmarks/distill_step.py", "--device", "cpu", "--out", out, *sizes],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        check=True,
        capture_output=True,
        timeout=300,
    )
    found = json.loads(out.read_text())
    assert found["device"] == "cpu" and found["command"] and found["environment"]["versions"]
    assert list(found["layers"]["arms"]) == [
        "all on", "without relative error in one kernel", "without fused teacher", "without Muon in batches", "all off"
    ]  # fmt: skip
    assert list(found["logits"]["arms"]) == [
        "all on", "without loss in one kernel", "without fused teacher", "without Muon in batches", "all off"
    ]  # fmt: skip
    for match in ("layers", "logits"):
        arms = found[match]["arms"].values()
        assert all(0 < arm["host_s"] <= arm["step_s"] for arm in arms)
        first, *others = (arm["loss"] for arm in arms)
        assert others == pytest.approx([first] * len(others), rel=1e-3)
