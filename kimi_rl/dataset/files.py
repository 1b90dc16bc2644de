"""Rows from local files: JSON Lines and parquet, with the file and the row named in every error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kimi_rl.errors import InputError, one_line

SUFFIXES = (".jsonl", ".parquet")
HELD_OUT_NAMES = ("test", "held_out", "validation", "val", "eval", "dev")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl or .parquet file. Row numbers in errors count from 1 (in .jsonl: the line).

    Blank lines are kept as empty dicts, so that position + 1 stays the line number; callers skip them. Raises
    InputError for a file that is missing, unreadable, of another kind or empty, and for a line that is no
    JSON object.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"data.path: {path} is no data file; use {' or '.join(SUFFIXES)}")
    try:
        rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    except OSError as error:
        raise InputError(f"data.path: cannot read {path} ({error.strerror or error})") from None
    if not any(rows):
        raise InputError(f"data.path: {path} holds no rows")
    return rows


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file of another kind than problems; a malformed line is named by file and number."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows = [row for row in _jsonl(path) if row]
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return rows


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        place = f"{path}, row {number}"
        try:
            text = line.decode()
            row = json.loads(text) if text.strip() else {}
        except UnicodeDecodeError as error:
            raise InputError(
                f"{place}: not UTF-8 (byte {error.start + 1} of the line); save it as UTF-8"
            ) from None
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise InputError(f"{place}: not valid JSON ({reason}); each line is one JSON object") from None
        except RecursionError:
            raise InputError(f"{place}: not valid JSON (nested too deeply)") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}: found a JSON {type(row).__name__}, each line is one JSON object")
        rows.append(row)
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"data.path: {path} is no valid parquet file ({one_line(error, 200)})") from None


def find_splits(folder: Path) -> tuple[list[Path], list[Path]]:
    """(training files, held-out files) of a folder; either may be empty, not both.

    Looks for `train.jsonl`, `train.parquet` or hub shards (`train-00000-of-00001.parquet`), and the same for
    the first name of HELD_OUT_NAMES that is there; in the folder itself, else in the hub's `data/`, `main/`,
    `default/`. A folder with one data file of any name is a training file alone. Raises InputError naming
    what was found.
    """
    for place in (folder, folder / "data", folder / "main", folder / "default"):
        if not place.is_dir():
            continue
        files = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES and file.is_file())
        train = _of_split(files, "train")
        held_out = next((found for name in HELD_OUT_NAMES if (found := _of_split(files, name))), [])
        if train or held_out:
            return train, held_out
        if len(files) == 1:
            return files, []
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder"
    raise InputError(
        f"data.path: {folder} has no train.jsonl, test.jsonl or their .parquet (found {found}); "
        f"name one file, or rename them"
    )


def _of_split(files: list[Path], name: str) -> list[Path]:
    """Files of one split: `name.jsonl` if there, else `name.parquet`, else all shards `name-*`."""
    exact = [file for file in files if file.stem == name]
    return exact[:1] or [file for file in files if file.stem.startswith(f"{name}-")]
