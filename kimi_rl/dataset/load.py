"""`load_problems`: problems from a task, local files or the hub, all in the same columns."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from kimi_rl.dataset.columns import EmptyGold, Row, RowError, find_columns, parse_row
from kimi_rl.dataset.files import HELD_OUT_NAMES, find_splits, read_rows
from kimi_rl.dataset.golds import unusable_golds
from kimi_rl.dataset.overlap import find_overlap, fingerprint, repeats, summarize
from kimi_rl.dataset.registry import INSTRUCTIONS, Source, find_source, known_names, nearest_names
from kimi_rl.dataset.tasks import get_task
from kimi_rl.errors import InputError, one_line
from kimi_rl.recipe import DataSection

log = logging.getLogger(__name__)

HELD_OUT_SIZE = 256

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "question": datasets.Value("string"),
        "prompt": datasets.List(
            {"role": datasets.Value("string"), "content": datasets.Value("string")},
        ),
        "solution": datasets.Value("string"),
        "answer": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class Problems:
    """Training and held-out problems.

    Columns of both: `id`, `question` (as in the source), `prompt` (one user message: question and
    instruction), `solution` (worked, ends in the final answer in a form that the rewards read), `answer`
    (gold); all str but the prompt. `answer_kind`: the `reward.kind` that fits: "exact" where answers compare as text
    (sequences), "math" where by value, or an import path. `dropped` names the rows that were left out, each with the
    reason. `instruction`: what every prompt asks for after the question; empty for none.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    name: str
    answer_kind: str = "math"
    dropped: tuple[str, ...] = ()
    instruction: str = ""


def load_problems(section: DataSection, *, evaluation: bool = False) -> Problems:
    """Problems as the recipe's `data` section asks for; the same ones in every process.

    Without a split for evaluation, problems are held out of the training split by `section.seed`.
    `train_size` and `held_out_size` draw a subset, also by seed, kept in source order; unset: all training
    problems and up to 256 held-out ones. `evaluation=True` is for measuring a model only: the training split
    may be missing (MATH-500), a single file is held out whole, a task makes no training problems, and
    `held_out_size` unset means all.

    Problems whose gold answer cannot be read as maths are left out and named in `dropped` (`section.check_golds`).
    Held-out problems that are training problems too, or nearly, are refused (`section.overlap`); where the held-out
    problems are drawn here, such training problems are left out instead.

    Raises InputError for an unknown task, parameter, file, folder or hub set, for a malformed row (with file
    and row number), for rows without an answer, for sizes that the data cannot give, and for overlap.
    """
    if section.task is not None:
        return _from_task(section, evaluation)
    found = _from_path(str(section.path), evaluation)
    if section.check_golds:
        _drop_unusable_golds(found, evaluation)
    _report(found)
    train, held_out = found.train, found.held_out
    if not train and not evaluation:
        raise InputError(
            f"data.path: {found.name} has no training problems, only some to evaluate on; use `eval`"
        )
    if not held_out:
        train, held_out = _hold_out(train, section.seed, section.held_out_size, found.name)
    elif section.overlap == "leave_out" and not evaluation:
        train = _left_out(train, held_out, found.name)
    held_out_size = section.held_out_size
    if held_out_size is None and not evaluation:
        held_out_size = min(HELD_OUT_SIZE, len(held_out))
    form = (train or held_out)[0].form
    instruction = INSTRUCTIONS[form] if section.instruction is None else section.instruction
    train = _sample(train, None if evaluation else section.train_size, "train_size", section, found.name)
    held_out = _sample(held_out, held_out_size, "held_out_size", section, found.name)
    if section.overlap != "leave_out" and not evaluation:
        _check_overlap(train, held_out, found.name, section.overlap == "allow")
    return Problems(
        train=_dataset(train, instruction),
        held_out=_dataset(held_out, instruction),
        name=found.name,
        dropped=tuple(found.dropped),
        instruction=instruction,
    )


def _from_task(section: DataSection, evaluation: bool) -> Problems:
    task = get_task(str(section.task))
    params = task.parse_params(section.params)
    sizes = {"train": section.train_size, "held_out": section.held_out_size}
    defaults = {"train": task.train_size, "held_out": task.held_out_size}
    instruction = task.instruction if section.instruction is None else section.instruction
    made = {}
    for split in ("train", "held_out"):
        wanted = sizes[split] or defaults[split]
        if split == "train" and evaluation:
            wanted = 0
        problems = task.problems(wanted, split, section.seed, params)
        if sizes[split] and len(problems) < wanted:
            raise InputError(
                f"data.{split}_size: asked for {wanted}, but {task.name} with these parameters has only "
                f"about {len(problems)} different {split} problems; ask for fewer or allow longer ones"
            )
        rows = [
            Row(f"{task.name}/{split}/{number}", problem.question, problem.solution, problem.answer, task.form)
            for number, problem in enumerate(problems)
        ]
        made[split] = _dataset(rows, instruction)
    return Problems(made["train"], made["held_out"], task.name, task.answer_kind, instruction=instruction)


@dataclass
class _Found:
    """What a path holds: rows of the two splits (either may be empty), and the rows that were left out."""

    name: str
    train: list[Row]
    held_out: list[Row]
    dropped: list[str]


def _from_path(path: str, evaluation: bool) -> _Found:
    local = Path(path).expanduser()
    if local.is_dir():
        found = _from_files(path, *find_splits(local))
    elif local.is_file():
        found = _from_files(path, [], [local]) if evaluation else _from_files(path, [local], [])
    elif source := find_source(path):
        found = _from_registry(source, evaluation)
    else:
        found = _from_other_hub_set(path)
    if not found.train and not found.held_out:
        raise InputError(f"data.path: no usable row in {path} ({found.dropped[0]})")
    return found


def _from_files(name: str, train: list[Path], held_out: list[Path]) -> _Found:
    dropped: list[str] = []
    return _Found(name, _read(train, dropped), _read(held_out, dropped), dropped)


def _read(files: Iterable[Path], dropped: list[str]) -> list[Row]:
    """Rows of local files. A wrong row raises InputError; one with an empty `\\boxed{}` is dropped."""
    rows = []
    for file in files:
        for number, row in enumerate(read_rows(file), start=1):
            if not row:
                continue
            try:
                rows.append(_with_id(parse_row(row, find_columns(row)), f"{file.stem}/{number}"))
            except EmptyGold as error:
                dropped.append(f"{file}, row {number}: {error}")
            except RowError as error:
                raise InputError(f"{file}, row {number}: {error}") from None
    return rows


def _from_registry(source: Source, evaluation: bool) -> _Found:
    dropped: list[str] = []

    def rows(which: Source, split: str) -> list[Row]:
        parts = [_load_hub(which.hub_id, config, split) for config in which.configs]
        return [row for part in parts for row in _hub_rows(part, f"{which.alias}/{split}", dropped, which)]

    other = find_source(source.held_out_from) if source.held_out_from else source
    held_out = rows(other, other.held_out) if other.held_out else []
    train = []
    if source.train and not (evaluation and held_out):
        train = rows(source, source.train)
    if other is not source:
        train = _without_repeats(train, held_out)
    return _Found(source.alias, train, held_out, dropped)


def _from_other_hub_set(path: str) -> _Found:
    """A hub set that the registry does not know: default config, splits by their usual names."""
    local_name = path.startswith((".", "/", "~")) or Path(path).suffix in (
        ".jsonl",
        ".json",
        ".parquet",
        ".csv",
    )
    parent_is_here = "/" in path and Path(path).parent.is_dir()
    if local_name or parent_is_here:
        raise InputError(f"data.path: no such file or folder: {path}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        near = nearest_names(path)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"known data sets: {', '.join(known_names())}"
        )
        raise InputError(f"data.path: no file or folder {path!r}, and no known data set of that name; {hint}")
    splits = _load_hub(path, None, None)
    names = [name for name in HELD_OUT_NAMES if name in splits]
    if "train" not in splits and not names:
        raise InputError(f"data.path: {path} has no split `train` or `test` (found {', '.join(splits)})")
    dropped: list[str] = []
    train = _hub_rows(splits["train"], f"{path}/train", dropped) if "train" in splits else []
    held_out = _hub_rows(splits[names[0]], f"{path}/{names[0]}", dropped) if names else []
    return _Found(path, train, held_out, dropped)


def _load_hub(hub_id: str, config: str | None, split: str | None) -> Any:
    """`datasets.load_dataset`, with every failure as one line (it raises many types without a common one)."""
    try:
        return datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:
        reason = one_line(error, 200) or type(error).__name__
        parts = ", ".join(f"{key} {value}" for key, value in (("config", config), ("split", split)) if value)
        raise InputError(
            f"data.path: cannot load {hub_id}{f' ({parts})' if parts else ''} from the Hugging Face hub: "
            f"{reason}; offline, give a local folder with train.jsonl and test.jsonl in the same columns"
        ) from None


def _hub_rows(
    part: datasets.Dataset, place: str, dropped: list[str], source: Source | None = None
) -> list[Row]:
    """Rows of a hub split. A row that has no usable answer is dropped: nobody but its owner can mend it."""
    if len(part) == 0:
        return []
    try:
        columns = find_columns(part[0])
    except RowError as error:
        raise InputError(f"data.path: {place}: {error}") from None
    # Some sets carry columns of many kilobytes a row (generations): leave those unread.
    wanted = (*columns.question, columns.answer, columns.solution, columns.id)
    keep = source.keep if source else ()
    tops = {
        name if name in part.column_names else name.split(".")[0] for name in (*wanted, *(k for k, _ in keep))
    }
    rows, seen = [], set()
    for number, row in enumerate(part.select_columns(sorted(tops - {""})), start=1):
        if any(row[name] != value for name, value in keep):
            continue
        try:
            parsed = _with_id(parse_row(row, columns, source.form if source else None), f"{place}/{number}")
        except RowError as error:
            dropped.append(f"{place}, row {number}: {error}")
            continue
        if source is not None and source.unique:
            if parsed.question in seen:
                continue
            seen.add(parsed.question)
        rows.append(parsed)
    return rows


def _with_id(row: Row, fallback: str) -> Row:
    return row if row.id else replace(row, id=fallback)


def _hold_out(rows: list[Row], seed: int, size: int | None, name: str) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): `size` problems (unset: a tenth, at most 256) drawn by seed.

    Training rows that are nearly the same as a held-out problem are left out.
    """
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        by_text.setdefault(fingerprint(row.question), []).append(row)
    size = size or min(HELD_OUT_SIZE, max(1, len(by_text) // 10))
    if size >= len(by_text):
        raise InputError(
            f"data.held_out_size: cannot hold out {size} of the {len(by_text)} different problems in {name} "
            f"and train on the rest; ask for fewer, or add a test.jsonl"
        )
    chosen = set(random.Random(seed).sample(list(by_text), size))
    held_out = [group[0] for text, group in by_text.items() if text in chosen]
    train = [row for row in rows if fingerprint(row.question) not in chosen]
    return _without_repeats(train, held_out), held_out


def _questions(rows: list[Row]) -> list[dict[str, str]]:
    return [{"id": row.id, "question": row.question} for row in rows]


def _without_repeats(train: list[Row], held_out: list[Row]) -> list[Row]:
    """The training rows that are neither the same as a held-out problem nor nearly so."""
    known = repeats(_questions(train), _questions(held_out))
    return [row for at, row in enumerate(train) if at not in known]


def _left_out(train: list[Row], held_out: list[Row], name: str) -> list[Row]:
    """As `_without_repeats`, and says so. Raises InputError if that leaves nothing."""
    kept = _without_repeats(train, held_out)
    if not kept:
        raise InputError(f"data.overlap: every training problem of {name} is a held-out problem as well; take another")
    if len(kept) < len(train):
        log.warning("%s: left out %d training problems that are held-out ones, or nearly", name, len(train) - len(kept))
    return kept


def _check_overlap(train: list[Row], held_out: list[Row], name: str, allowed: bool) -> None:
    """Raises InputError where a held-out problem is `exact` or `near` to a training problem; warns if `allowed`."""
    found = [o for o in find_overlap(_questions(train), _questions(held_out)) if o.kind != "variant"]
    if not found:
        return
    if not allowed:
        raise InputError(
            f"data.path: {name}: {summarize(found, 5)}; remove these rows, or set data.overlap=leave_out, or =allow to "
            "train on them all the same"
        )
    log.warning("%s: %s", name, summarize(found))


def _drop_unusable_golds(found: _Found, evaluation: bool) -> None:
    """Take rows whose gold answer cannot be read out of `found`, and name them in its `dropped`."""
    rows = found.held_out if evaluation and found.held_out else found.train + found.held_out
    unusable = unusable_golds(row.answer for row in rows)
    for part in (found.train, found.held_out):
        for row in part:
            if row.answer in unusable:
                found.dropped.append(f"{row.id}: gold answer {row.answer[:80]!r}: {unusable[row.answer]}")
        part[:] = [row for row in part if row.answer not in unusable]
    if not found.train and not found.held_out:
        raise InputError(
            f"data.path: no usable row in {found.name} ({found.dropped[0]}); for answers that are no maths, set "
            "data.check_golds=false and reward.kind"
        )


def _sample(rows: list[Row], size: int | None, field: str, section: DataSection, name: str) -> list[Row]:
    """`size` of the rows by seed, in source order; all of them where `size` is None."""
    if size is None or size == len(rows):
        return rows
    if size > len(rows):
        raise InputError(f"data.{field}: asked for {size}, but {name} has {len(rows)}; ask for fewer")
    return [rows[i] for i in sorted(random.Random(section.seed).sample(range(len(rows)), size))]


def _dataset(rows: list[Row], instruction: str) -> datasets.Dataset:
    prompts = ("\n".join(part for part in (row.question, instruction) if part) for row in rows)
    columns = {
        "id": [row.id for row in rows],
        "question": [row.question for row in rows],
        "prompt": [[{"role": "user", "content": prompt}] for prompt in prompts],
        "solution": [row.solution for row in rows],
        "answer": [row.answer for row in rows],
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def _report(found: _Found) -> None:
    if found.dropped:
        shown = "; ".join(found.dropped[:3]) + ("; ..." if len(found.dropped) > 3 else "")
        count = len(found.dropped)
        log.warning("%s: left out %d rows without a usable answer: %s", found.name, count, shown)
