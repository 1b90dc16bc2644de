"""What a comparison shows while it goes: a table of its runs on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kimi_rl.compare.plan import Run
from kimi_rl.progress import LiveView, Tail, duration, figures, held_out_text

_STYLES = {"complete": "green", "failed": "red", "running": "cyan", "waiting": "dim"}


@dataclass
class _Line:
    """What is known of one run."""

    status: str = "waiting"
    detail: str = ""
    row: dict[str, Any] = field(default_factory=dict)
    held_out: str = ""
    tail: Tail | None = None
    since: float = 0.0
    seconds: float | None = None


class Watch(LiveView):
    """Shows the runs of a comparison. `enabled=False` shows nothing. Used from one thread."""

    def __init__(
        self,
        runs: list[Run],
        enabled: bool = True,
        *,
        console: Console | None = None,
        plain_every: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(enabled, console, plain_every, clock, redraws_per_s=2, last_printed=clock())
        self._lines = {run.folder: _Line() for run in runs}
        self._names = {run.folder: f"{run.arm} seed {run.seed}" for run in runs}

    def started(self, run: Run, metrics: Path, resumed: bool) -> None:
        line = self._lines[run.folder]
        line.status, line.tail, line.since = "running", Tail(metrics), self._clock()
        self._print(f"{self._names[run.folder]}: {'goes on' if resumed else 'starts'} ({self._progress()})")

    def ended(
        self, run: Run, status: str, error: str | None = None, *, seconds: float | None = None, kept: bool = False
    ) -> None:
        line = self._lines[run.folder]
        self._read(line)
        line.status, line.tail, line.seconds = status, None, seconds
        line.detail = error or ("made before" if kept else "")
        text = f"{self._names[run.folder]}: {status}"
        text += f" in {duration(seconds)}" if seconds is not None else ""
        text += f"  held-out {line.held_out}" if line.held_out else ""
        self._print(f"{text}  {line.detail}".rstrip() + f" ({self._progress()})")

    def say(self, text: str) -> None:
        """Something besides the runs."""
        (self._live.console.print if self._live is not None else self._print)(text)

    def refresh(self) -> None:
        """Read what the running runs have written."""
        for line in self._lines.values():
            self._read(line)
        if self._live is None and self._line_is_due():
            for name, line in self._lines.items():
                if line.status == "running" and line.row:
                    self._print(f"{self._names[name]}: {self._step(line)}")

    def _read(self, line: _Line) -> None:
        for row in line.tail.read() if line.tail is not None else ():
            if row.get("type") == "train":
                line.row = row
            elif row.get("type") == "eval":
                line.held_out = held_out_text(row) or line.held_out

    def _progress(self) -> str:
        done = sum(line.status in ("complete", "failed") for line in self._lines.values())
        return f"{done} of {len(self._lines)} runs done"

    def _step(self, line: _Line) -> str:
        row = line.row
        if not row:
            return "starting"
        parts = [f"{row.get('stage')} {row.get('step')}/{row.get('steps_total', '?')}"]
        return "  ".join(parts + [f"{name} {value}" for name, value in figures(row)])

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, line in self._lines.items():
            running = line.status == "running"
            seconds = self._clock() - line.since if running else line.seconds
            table.add_row(
                self._names[name],
                Text(line.status, style=_STYLES[line.status]),
                duration(seconds) if seconds is not None else "",
                Text(f"held-out {line.held_out}" if line.held_out else ""),
                Text(self._step(line) if running else line.detail, style="dim"),
            )
        table.add_row(Text(self._progress(), style="bold"))
        return table
