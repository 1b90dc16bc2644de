"""What a run shows while it goes: a live table on a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kimi_rl.run_dir import parse_line

# Which columns of a metrics row are shown, under which name, and how.
_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "reward": ("reward", lambda v: f"{v:.3f}"),
    "accuracy": ("accuracy", lambda v: f"{v:.1%}"),
    "loss": ("loss", lambda v: f"{v:.4f}"),
    "kl_to_teacher": ("KL", lambda v: f"{v:.4f}"),
    "layer_error_max": ("worst layer", lambda v: f"{v:.4f}"),
    "completion_length": ("length", lambda v: f"{v:.0f}"),
    "tokens_per_s": ("tokens/s", lambda v: f"{v:,.0f}"),
    "mismatch_kl": ("mismatch KL", lambda v: f"{v:.1e}"),
    "staleness_max": ("staleness", lambda v: f"{v:.0f}" if v else ""),
    "worker_idle_share": ("workers idle", lambda v: f"{v:.0%}"),
}
_WINDOW = 20  # steps whose duration the remaining time is estimated from


class LiveView:
    """A view that redraws in place on a terminal, and otherwise prints lines now and then; `_render` draws it.

    With `enabled=False` it shows nothing.
    """

    def __init__(
        self,
        enabled: bool,
        console: Console | None,
        plain_every: float,
        clock: Callable[[], float],
        *,
        redraws_per_s: int,
        last_printed: float,
    ):
        self._console = console or Console()
        self._enabled = enabled
        self._plain_every = plain_every
        self._clock = clock
        self._redraws_per_s = redraws_per_s
        self._last_printed = last_printed
        self._live: Live | None = None

    def _render(self) -> Any:
        raise NotImplementedError

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=self._redraws_per_s
            )
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line_is_due(self) -> bool:
        """Whether it is time for another line where none was asked for."""
        return self._clock() - self._last_printed >= self._plain_every

    def _print(self, text: str) -> None:
        if not self._enabled or self._live is not None:
            return
        self._last_printed = self._clock()
        # `soft_wrap`: a log file has no width; one row stays one line.
        self._console.print(Text(text), soft_wrap=True)


class ProgressView(LiveView):
    """Shows the rows of metrics.jsonl as they come.

    On a terminal it redraws in place; otherwise it prints a line every `plain_every` seconds, and always
    those of evaluations, of notes and of a stage's last step. With `enabled=False` it shows nothing.
    Thread-safe.
    """

    def __init__(
        self,
        enabled: bool = True,
        *,
        console: Console | None = None,
        plain_every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(enabled, console, plain_every, clock, redraws_per_s=4, last_printed=-float("inf"))
        self._lock = threading.Lock()
        self._status = ""
        self._start_stage({})

    def status(self, text: str) -> None:
        """Say what is going on between the rows, for instance "building the model"."""
        with self._lock:
            self._status = text
            self._print(text)

    def update(self, row: dict[str, Any]) -> None:
        """Take in one metrics row."""
        with self._lock:
            if row.get("stage") != self._row.get("stage"):
                self._start_stage(row)
            kind = row.get("type")
            if kind == "note":
                self._print(f"{row.get('stage')}: {row.get('text', '')}")
                return
            if kind == "eval":
                self._held_out = held_out_text(row)
            elif kind == "train":
                self._times.append((row.get("step") or 0, row.get("time") or 0.0))
                self._row = row
            self._status = ""
            last = bool(row.get("steps_total")) and row.get("step") == row.get("steps_total")
            if kind == "eval" or last or self._line_is_due():
                self._print(self._line(row))

    def _start_stage(self, row: dict[str, Any]) -> None:
        self._row = {key: row.get(key) for key in ("stage", "kind", "steps_total")} | {"step": 0}
        self._held_out: str | None = None
        self._times: deque[tuple[int, float]] = deque(maxlen=_WINDOW + 1)

    def _line(self, row: dict[str, Any]) -> str:
        head = f"{row.get('stage')} {row.get('step')}/{row.get('steps_total', '?')}"
        if row.get("type") == "eval":
            return f"{head}  held-out {row.get('when', '')}: {held_out_text(row) or 'no figures'}"
        parts = [head, *(f"{name} {value}" for name, value in figures(row))]
        eta = self.eta_s()
        return "  ".join([*parts, f"ETA {duration(eta)}"] if eta else parts)

    def eta_s(self) -> float | None:
        """Seconds until the stage's last step, from the pace of the latest steps; None while unknown."""
        if len(self._times) < 2:
            return None
        (first, start), (last, end) = self._times[0], self._times[-1]
        total = self._row.get("steps_total")
        if last <= first or not total:
            return None
        return max(total - last, 0) * (end - start) / (last - first)

    def _render(self) -> Group:
        with self._lock:
            row, held_out, eta, status = dict(self._row), self._held_out, self.eta_s(), self._status
        parts: list[Any] = []
        if row.get("stage"):
            step, total = row.get("step") or 0, row.get("steps_total") or 0
            bar = Table.grid(padding=(0, 1))
            bar.add_row(
                Text(str(row["stage"]), style="bold"),
                ProgressBar(total=max(total, 1), completed=step, width=30),
                f"{step}/{total or '?'}",
                f"ETA {duration(eta)}" if eta is not None else "",
            )
            table = Table.grid(padding=(0, 2))
            shown = [*figures(row), *([("held-out", held_out)] if held_out else [])]
            if shown:
                table.add_row(*(Text(name, style="dim") for name, _ in shown))
                table.add_row(*(value for _, value in shown))
            parts += [bar, table]
        if status:
            parts.append(Text(status, style="dim"))
        return Group(*parts)


def figures(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a train row as (name, text), those that it has."""
    shown = [(name, show(row[key])) for key, (name, show) in _FIGURES.items() if row.get(key) is not None]
    return [(name, text) for name, text in shown if text]


def held_out_text(row: dict[str, Any]) -> str | None:
    """An evaluation's figures, with standard errors: `61.3% ± 3.0%  avg@4 58.1% ± 2.2%`; or perplexities."""
    parts = []
    if row.get("student_perplexity") is not None:
        parts.append(f"perplexity {row['student_perplexity']:.3f} (teacher {row['teacher_perplexity']:.3f})")
    for name, value, error in (
        ("", row.get("held_out_accuracy"), row.get("held_out_se")),
        (f"avg@{row.get('k')} ", row.get("avg_at_k"), row.get("avg_at_k_se")),
    ):
        if value is not None:
            parts.append(f"{name}{value:.1%}" + (f" ± {error:.1%}" if error is not None else ""))
    return "  ".join(parts) or None


def duration(seconds: float | None) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`; `–` for None."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def follow(
    metrics_path: Path, view: ProgressView, stop_event: threading.Event, *, poll_s: float = 0.25
) -> None:
    """Feed `view` the rows of a growing metrics.jsonl until `stop_event` is set, then what is left of it.

    The file may not exist yet, may end in a torn line, and may be replaced by a shorter one (a resumed run
    drops rows): no row is delivered twice.
    """
    tail = Tail(Path(metrics_path))
    while True:
        stopping = stop_event.is_set()  # asked before reading, so that rows written until then are read
        for row in tail.read():
            view.update(row)
        if stopping:
            return
        stop_event.wait(poll_s)


class Tail:
    """The new rows of a JSON-lines file since the last call of `read`."""

    def __init__(self, path: Path):
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._seen: set[int] = set()

    def read(self) -> Iterator[dict[str, Any]]:
        try:
            with open(self._path, "rb") as file:
                stat = os.fstat(file.fileno())
                identity = (stat.st_dev, stat.st_ino)
                if identity != self._identity or stat.st_size < self._offset:
                    self._identity, self._offset = identity, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            # Rows carry the time they were written at, so that equal lines are the same row.
            key = hash(line)
            if key in self._seen:
                continue
            self._seen.add(key)
            row = parse_line(line)
            if row is not None:
                yield row
