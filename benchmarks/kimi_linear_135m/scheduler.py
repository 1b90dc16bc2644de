"""Steps with needs, put on cards by one process: which may run where, how long all will take, and running them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kimi_rl.run_dir import atomic_write_text

MARGIN_GIB = 4.0  # of a card's memory: contexts of processes, fragments
MOST_LOAD = 2.4  # of all steps on a card: more at once only take each other's memory
GRACE_S = 15.0  # from an interrupt to a kill


@dataclass
class Step:
    """A command with an estimate of its `seconds` (alone on a card).

    `needs`: steps that must be done; `after`: steps that must have ended, however. `reads`: a path that what it needs
    leaves half-way; once it is there, the step may run in the spare time of a card. `load`: the part of a card's time
    that it takes, 0 for a step without a card, after `start_s` of its seconds; `gib`: of the card's memory. `cards`: on
    how many it works, each with this load and memory. `makes`: a path that it leaves, if it is done. `settle`: called
    once its needs are met, to set its command and estimate by what came out so far.
    """

    name: str
    command: list[str]
    seconds: float
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    load: float = 0.0
    start_s: float = 0.0
    gib: float = 0.0
    cards: int = 1
    threads: int = 1
    makes: str | None = None
    reads: str | None = None
    settle: Callable[[Step], None] | None = None

    @property
    def limit_s(self) -> float:
        return 2.5 * self.seconds + 240


@dataclass
class Card:
    """A card and the steps on it. `id`: as in CUDA_VISIBLE_DEVICES; "" for none, where steps share the CPU."""

    id: str
    name: str = "cpu"
    gib: float = float("inf")
    steps: dict[str, Step] = field(default_factory=dict)

    @property
    def load(self) -> float:
        return sum(step.load for step in self.steps.values())

    def has_room(self, step: Step, most_load: float) -> bool:
        if not self.steps:
            return True  # more there will never be
        taken = sum(other.gib for other in self.steps.values()) + step.gib
        return taken + MARGIN_GIB <= self.gib and self.load + step.load <= most_load + 1e-9


@dataclass
class Record:
    """What became of a step, as state.json holds it. `status`: waiting, running, done, failed, stopped (at its limit
    or with the whole; goes on in the next call) or blocked (something that it needs failed)."""

    status: str = "waiting"
    card: str | None = None  # its id, or several with commas
    began: float | None = None  # seconds after the start of this call
    seconds: float = 0.0  # of all its attempts
    estimate: float = 0.0
    command: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.status not in ("waiting", "running")


class Process(Protocol):
    """What `launch` returns."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def send(self, number: int) -> None:
        """A signal, to it and all its children."""


class Group(subprocess.Popen):
    """A process that leads a group of its own."""

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them may be gone already
            os.killpg(self.pid, number)


def check_graph(steps: Sequence[Step]) -> None:
    """Names are unique, what is needed exists and comes before."""
    seen: set[str] = set()
    for step in steps:
        missing = [name for name in (*step.needs, *step.after) if name not in seen]
        if step.name in seen or missing:
            raise ValueError(f"step {step.name}: " + (f"needs {missing} before it" if missing else "stands twice"))
        seen.add(step.name)


def priorities(steps: Sequence[Step]) -> dict[str, float]:
    """Seconds from the start of each step to the end of the longest chain that hangs on it."""
    longest: dict[str, float] = {}
    for step in reversed(steps):  # dependents stand after what they need
        tail = [longest[other.name] for other in steps if step.name in (*other.needs, *other.after)]
        longest[step.name] = step.seconds + max(tail, default=0.0)
    return longest


def pick(
    waiting: Iterable[Step],
    cards: Sequence[Card],
    slots: int,
    *,
    done: Collection[str],
    ended: Collection[str],
    priority: Mapping[str, float],
    early: Collection[str] = (),
) -> tuple[Step, list[Card]] | None:
    """The next step to start and its cards, or None. `slots`: how many more processes may run; `early`: steps that can
    start while what they need still runs, on a card with so much time to spare.

    The step on which most hangs comes first; it gets the cards with the least load that have room for it.
    """
    met = {step.name for step in waiting if set(step.needs) <= set(done)}
    ready = [s for s in waiting if s.name in {*met, *early} and set(s.after) <= set(ended)]
    for step in sorted(ready, key=lambda s: -priority[s.name]) if slots > 0 else ():
        if not step.load:
            return step, []
        most = MOST_LOAD if step.name in met else 1.0
        free = sorted((card for card in cards if card.has_room(step, most)), key=lambda card: card.load)
        if len(free) >= step.cards:
            return step, free[: step.cards]
    return None


def forecast(
    steps: Sequence[Step],
    cards: Sequence[Card],
    slots: int,
    *,
    done: Collection[str] = (),
    ended: Collection[str] = (),
    running: Mapping[str, tuple[str | None, float]] | None = None,
) -> dict[str, tuple[float, float]]:
    """When each step begins and ends, in seconds from now, if all take what was estimated.

    `running`: step to its `Record.card` and the seconds that it still needs. Steps that work on a card on which loads
    add up to more than 1 are slowed down by that. Steps that can never start are left out.
    """
    known = {step.name: step for step in steps}
    cards = [Card(card.id, card.name, card.gib) for card in cards]
    done, ended = set(done), set(ended) | set(done)
    place: dict[str, list[Card]] = {}
    left: dict[str, float] = {}
    times: dict[str, tuple[float, float]] = {}
    priority, now = priorities(steps), 0.0

    def start(step: Step, its: list[Card], seconds: float) -> None:
        place[step.name], left[step.name], times[step.name] = its, max(seconds, 1e-6), (now, now)
        for card in its:
            card.steps[step.name] = step

    for name, (ids, seconds) in (running or {}).items():
        its = [card for card in cards if ids is not None and card.id in ids.split(",")]
        start(known[name], its, seconds)
    while True:
        waiting = [step for step in steps if step.name not in times and step.name not in ended]
        while found := pick(waiting, cards, slots - len(left), done=done, ended=ended, priority=priority):
            start(*found, found[0].seconds)
            waiting.remove(found[0])
        if not left:
            return times
        starting = {name: max(left[name] - (known[name].seconds - known[name].start_s), 0.0) for name in left}
        working = {name for name in left if starting[name] <= 1e-6}
        rates = {name: 1.0 for name in left}
        for name in working:
            loads = [sum(known[other].load for other in card.steps if other in working) for card in place[name]]
            rates[name] = 1 / max([1.0, *loads])
        passed = min((starting[name] if name not in working else left[name]) / rates[name] for name in left)
        now += passed
        for name in list(left):
            left[name] -= passed * rates[name]
            if left[name] <= 1e-6:
                del left[name]
                times[name] = (times[name][0], now)
                done, ended = done | {name}, ended | {name}
                for card in place[name]:
                    del card.steps[name]


def launch(step: Step, log: Path, folder: Path, environment: dict[str, str]) -> Group:
    """Start a step in `folder`; what it says goes to `log`."""
    card = environment.get("CUDA_VISIBLE_DEVICES")
    with log.open("ab") as file:
        file.write(f"$ CUDA_VISIBLE_DEVICES={card} {shlex.join(step.command)}\n".encode())
        file.flush()
        return Group(
            step.command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell that starts this in the background lets children ignore the interrupt that ends them cleanly.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


class Scheduler:
    """Runs a graph of steps in `folder`, and keeps what became of them in its state.json.

    Steps that state.json calls done, and whose `makes` is there, are not repeated. `seconds`: the time that this call
    has; what runs then is interrupted, and goes on in the next one. `notes` go into state.json as they are.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        cards: Sequence[Card],
        slots: int,
        folder: Path,
        seconds: float,
        *,
        environment: Mapping[str, str] | None = None,
        notes: dict[str, Any] | None = None,
        launch: Callable[[Step, Path, Path, dict[str, str]], Process] = launch,
        say: Callable[[str], None] = print,
        poll_s: float = 0.5,
    ):
        check_graph(steps)
        self.steps, self.cards, self.slots, self.folder = list(steps), list(cards), slots, folder
        self.notes = notes if notes is not None else {}
        self._environment, self._launch, self._say, self._poll_s = dict(environment or os.environ), launch, say, poll_s
        self._start, self._seconds = time.time(), seconds
        self._processes: dict[str, tuple[Process, float]] = {}
        self._settled: set[str] = set()
        old = read_state(folder).get("steps", {})
        self._others = {name: row for name, row in old.items() if name not in {step.name for step in steps}}
        self.records = {step.name: self._recall(step, old.get(step.name, {})) for step in steps}

    def _recall(self, step: Step, old: dict[str, Any]) -> Record:
        record = Record(estimate=step.seconds, command=step.command, seconds=old.get("seconds", 0.0))
        if old.get("status") == "done" and (step.makes is None or (self.folder / step.makes).exists()):
            return Record(**old)
        return record

    # --- what is known ----------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds since the start of this call."""
        return time.time() - self._start

    def time_left(self) -> float:
        return self._seconds - self.now()

    def names(self, *statuses: str) -> list[str]:
        return [name for name, record in self.records.items() if record.status in statuses]

    def forecast(self) -> dict[str, tuple[float, float]]:
        """`forecast` of what is not done yet, in seconds from now."""
        running = {
            name: (self.records[name].card, max(self._step(name).seconds - (self.now() - began), 5.0))
            for name, (_, began) in self._processes.items()
        }
        return forecast(
            self.steps, self.cards, self.slots, done=self.names("done"), ended=self._ended(), running=running
        )

    def _ended(self) -> list[str]:
        return [name for name, record in self.records.items() if record.ended]

    def _step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    # --- running ----------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Run until all has ended or the time is over. Returns whether every step is done."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.save()
        try:
            while len(self._ended()) < len(self.steps) and self.time_left() > 0:
                self._reap()
                self._block()
                self._start_what_can()
                if not self._processes and not self.names("waiting"):
                    break
                time.sleep(self._poll_s)
            self._stop(self.names("running"), "the time of this call was over")
        except BaseException:
            self._stop(self.names("running"), "this call was interrupted")
            raise
        return len(self.names("done")) == len(self.steps)

    def _start_what_can(self) -> None:
        while True:
            done, ended = self.names("done"), self._ended()
            waiting = [self._step(name) for name in self.names("waiting")]
            for step in waiting:
                met = set(step.needs) <= set(done) and set(step.after) <= set(ended)
                if met and step.settle is not None and step.name not in self._settled:
                    self._settled.add(step.name)
                    try:
                        step.settle(step)
                    except Exception as error:  # whatever it is, the other steps go on
                        self._end(step.name, "failed", f"{type(error).__name__}: {error}")
                        continue
                    self.records[step.name].estimate, self.records[step.name].command = step.seconds, step.command
            waiting = [step for step in waiting if self.records[step.name].status == "waiting"]
            found = pick(
                waiting, self.cards, self.slots - len(self._processes), done=done, ended=ended,
                priority=priorities(self.steps), early={step.name for step in waiting if self._is_there(step)},
            )  # fmt: skip
            if found is None:
                return
            self._begin(*found)

    def _begin(self, step: Step, cards: list[Card]) -> None:
        record, ids = self.records[step.name], ",".join(card.id for card in cards)
        environment = self._environment | {
            "CUDA_VISIBLE_DEVICES": ids,
            "OMP_NUM_THREADS": str(step.threads),
        }
        process = self._launch(step, self.folder / "logs" / f"{step.name}.log", self.folder, environment)
        self._processes[step.name] = process, self.now()
        for card in cards:
            card.steps[step.name] = step
        record.status, record.card, record.began, record.error = "running", ids if cards else None, self.now(), None
        where = f" on card {ids}" if ids else ""
        self._tell(step.name, f"begins{where}, about {step.seconds:.0f} s alone")
        self.save()

    def _reap(self) -> None:
        over = [n for n, (_, began) in self._processes.items() if self.now() - began > self._step(n).limit_s]
        if over:
            self._stop(over, "took longer than its limit")
        for name, (process, _) in list(self._processes.items()):
            code = process.poll()
            if code is None:
                continue
            makes = self._step(name).makes
            if code:
                last = _last_line(self.folder / "logs" / f"{name}.log")
                self._end(name, "failed", f"exit code {code}: {last}")
            elif makes is not None and not (self.folder / makes).exists():
                self._end(name, "failed", f"ended well, but left no {makes}")
            else:
                self._end(name, "done", None)

    def _block(self) -> None:
        """What needs a step that failed or was stopped will not run in this call."""
        for name in self.names("waiting"):
            lost = [other for other in self._step(name).needs if self.records[other].status in _LOST]
            if lost and not self._is_there(self._step(name)):
                self._end(name, "blocked", f"needs {lost[0]}")

    def _is_there(self, step: Step) -> bool:
        return step.reads is not None and (self.folder / step.reads).exists()

    def _end(self, name: str, status: str, error: str | None) -> None:
        record = self.records[name]
        took = ""
        if name in self._processes:
            _, began = self._processes.pop(name)
            record.seconds += self.now() - began
            took = f" after {self.now() - began:.0f} s"
        for card in self.cards:
            card.steps.pop(name, None)
        record.status, record.error = status, error
        self._tell(name, f"{status}{took}" + (f": {error}" if error else ""))
        self.save()

    def _stop(self, names: Collection[str], why: str) -> None:
        for name in names:
            self._processes[name][0].send(signal.SIGINT)
        end = time.time() + GRACE_S
        while time.time() < end and any(self._processes[name][0].poll() is None for name in names):
            time.sleep(0.1)
        for name in names:
            self._processes[name][0].send(signal.SIGKILL)
            self._end(name, "stopped", why)

    def _tell(self, name: str, text: str) -> None:
        self._say(f"{self.now():5.0f} s  {name}: {text}")

    def save(self) -> None:
        """Write state.json."""
        rows = self._others | {name: asdict(record) for name, record in self.records.items()}
        cards = [{"id": card.id, "name": card.name} for card in self.cards]
        state = {**self.notes, "started": self._start, "seconds": self._seconds, "cards": cards, "steps": rows}
        atomic_write_text(self.folder / "state.json", json.dumps(state, indent=1) + "\n")


_LOST = ("failed", "stopped", "blocked")


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json of `folder` holds; empty where there is none."""
    path = folder / "state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return lines[0].strip()[:200] if lines else ""
