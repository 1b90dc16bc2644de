"""Which problems a step trains on: shuffled, by running success rate, or easy ones first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch

from kimi_rl.seeds import derive_seed

PromptOrder = Literal["shuffle", "prioritized", "curriculum"]

_LEAST_WEIGHT = 0.05  # a problem that is always solved is still looked at now and then
_FIRST_SHARE = 0.2  # of the problems, the easiest, with which a curriculum starts
_MEMORY = 0.5  # weight of a problem's newest success rate in its running one


class EndlessShuffle:
    """All of `rows` numbers in random order, then again in another, without end; place n is a function of the seed."""

    def __init__(self, rows: int, seed: int, name: str):
        self._rows, self._seed, self._name = rows, seed, name
        self._epoch, self._order = -1, []

    def at(self, position: int) -> int:
        epoch, place = divmod(position, self._rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, self._name, epoch))
            self._epoch, self._order = epoch, torch.randperm(self._rows, generator=generator).tolist()
        return self._order[place]


class PromptSampler:
    """Draws row numbers. A function of the seed, the draws before, and the success rates reported: no clock, no
    global random state, so that a resumed run goes on with exactly the next prompts.

    shuffle: every problem once, in a new random order each time round.
    prioritized: in proportion to 1 - success rate (Kimi k1.5, arXiv 2501.12599, section 2.3.4); unseen ones count as 0.
    curriculum: uniform among the easiest share of the problems, which grows linearly from a fifth to all of them at
    `curriculum_steps`. Easy is a high success rate, or, while a problem is unseen, a high `prior`.

    Args:
        rows: number of problems. prior: a guess at each one's success rate (the pass rate that `kimi-rl select`
            wrote, or minus its level); only its order matters. None: all alike.
    """

    def __init__(
        self,
        rows: int,
        *,
        seed: int,
        order: PromptOrder = "shuffle",
        curriculum_steps: int = 1,
        prior: Sequence[float] | None = None,
    ):
        self.rows, self.seed, self.order, self.curriculum_steps = rows, seed, order, curriculum_steps
        self._prior = list(prior) if prior is not None else [0.0] * rows
        self._rates: dict[int, float] = {}
        self._taken = 0  # rows drawn so far
        self._returned: deque[int] = deque()  # drawn before a restart and never trained on
        self._shuffle = EndlessShuffle(rows, seed, "prompt order")
        self._lock = threading.Lock()  # batches that are made side by side draw replacements

    def draw(self, count: int, step: int, avoid: Sequence[int] = ()) -> list[int]:
        """The next `count` problems, for step `step` (from 1). `avoid`: row numbers not to draw if others can be."""
        with self._lock:
            drawn = [self._returned.popleft() for _ in range(min(count, len(self._returned)))]
            missing = count - len(drawn)
            if self.order == "shuffle":
                drawn += [self._shuffle.at(position) for position in range(self._taken, self._taken + missing)]
            else:
                drawn += self._weighted(missing, step, {*avoid, *drawn})
            self._taken += missing
            return drawn

    def _weighted(self, count: int, step: int, avoid: set[int]) -> list[int]:
        weights = torch.tensor(self.weights(step), dtype=torch.float64)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "prompt draw", self._taken))
        drawn: list[int] = []
        while len(drawn) < count:
            free = weights.clone()
            free[list(avoid | set(drawn))] = 0.0
            if not free.any():  # fewer problems than the step needs: some come twice
                free, avoid = weights.clone(), set()
            number = min(count - len(drawn), int((free > 0).sum()))
            drawn += torch.multinomial(free, number, generator=generator).tolist()
        return drawn

    def weights(self, step: int) -> list[float]:
        """How likely each problem is to be drawn at `step`, up to a factor; not for `shuffle`."""
        if self.order == "prioritized":
            return [max(_LEAST_WEIGHT, 1.0 - self._rates.get(row, 0.0)) for row in range(self.rows)]
        share = min(1.0, _FIRST_SHARE + (1 - _FIRST_SHARE) * (step - 1) / self.curriculum_steps)
        seen = sorted(self._rates.values())
        middle = seen[len(seen) // 2] if seen else 0.0
        # Problems that were tried stand by what came of it; the others, in the order of their prior, around the middle.
        place = {row: (self._rates.get(row, middle), self._prior[row], -row) for row in range(self.rows)}
        easiest = sorted(place, key=place.__getitem__, reverse=True)[: max(1, round(share * self.rows))]
        weights = [0.0] * self.rows
        for row in easiest:
            weights[row] = 1.0
        return weights

    def report(self, row: int, success: float) -> None:
        """The share of right answers in a group on `row`."""
        with self._lock:
            old = self._rates.get(row)
            self._rates[row] = success if old is None else (1 - _MEMORY) * old + _MEMORY * success

    def give_back(self, rows: Sequence[int]) -> None:
        """Rows that were drawn and not trained on: they come first."""
        self._returned.extend(rows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        with self._lock:
            rates = {str(row): rate for row, rate in sorted(self._rates.items())}
            return {"taken": self._taken, "returned": list(self._returned), "rates": rates}

    def load(self, state: dict[str, Any]) -> None:
        self._taken, self._returned = state["taken"], deque(state["returned"])
        self._rates = {int(row): rate for row, rate in state["rates"].items()}
