"""Rollout batches: prompts drawn, completed, verified and, with dynamic sampling, replaced; now or ahead of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kimi_rl.dataset.prompt_order import PromptSampler
from kimi_rl.recipe import RLVRStage
from kimi_rl.rewards import Verdict
from kimi_rl.rollout.engine import Completion, Request, SamplingParams
from kimi_rl.rollout.pool import RolloutPool
from kimi_rl.seeds import derive_seed

Row = dict[str, Any]


@dataclass
class Group:
    """The completions of one prompt, and the verdict on each."""

    number: int  # of the problem in the training data
    row: Row
    completions: list[Completion]
    verdicts: list[Verdict]

    @property
    def success(self) -> float | None:
        """Share of right answers; None if no completion could be scored."""
        values = [v.status == "correct" for v in self.verdicts if v.value is not None]
        return sum(values) / len(values) if values else None

    @property
    def uniform(self) -> bool:
        """Whether all completions got one reward, so that the group teaches nothing."""
        return len({v.value for v in self.verdicts if v.value is not None}) < 2


@dataclass
class RolloutBatch:
    """What one step trains on. `seen`: every group that was completed for it, those that were replaced included."""

    step: int
    groups: list[Group]
    seen: list[Group]
    rounds: int = 0  # of replacement
    replaced_right: int = 0  # groups that gave way because all answers were right
    replaced_wrong: int = 0
    generate_s: float = 0.0
    verify_s: float = 0.0

    @property
    def completions(self) -> list[Completion]:
        return [completion for group in self.groups for completion in group.completions]

    @property
    def verdicts(self) -> list[Verdict]:
        return [verdict for group in self.groups for verdict in group.verdicts]

    @property
    def rows(self) -> list[Row]:
        return [group.row for group in self.groups for _ in group.completions]

    @property
    def tokens(self) -> int:
        """Sampled for this batch, replaced groups included."""
        return sum(len(c.token_ids) for group in self.seen for c in group.completions)


class BatchMaker:
    """Makes the batch of a step from its prompts. Called from one thread, or from several for different steps."""

    def __init__(
        self,
        pool: RolloutPool,
        sampler: PromptSampler,
        rows: Sequence[Row],
        stage: RLVRStage,
        *,
        seed: int,
        tokenize: Callable[[Row], list[int]],
        decode: Callable[[Sequence[int]], str],
        verify: Callable[[list[tuple[str, str]]], list[Verdict]],
    ):
        self._pool, self.sampler, self._rows, self._stage, self._seed = pool, sampler, rows, stage, seed
        self._tokenize, self._decode, self._verify = tokenize, decode, verify
        rollout = stage.rollout
        self._params = SamplingParams(rollout.max_tokens, rollout.temperature, rollout.top_p)

    def make(self, step: int, drawn: list[int]) -> RolloutBatch:
        """Complete the problems `drawn`, and replace uniform groups if the stage says so.

        `drawn` grows by every problem drawn as a replacement.
        """
        batch = RolloutBatch(step, [], [])
        batch.groups = self._complete(batch, drawn)
        batch.seen += batch.groups
        dynamic = self._stage.dynamic_sampling
        for _ in range(dynamic.max_rounds if dynamic else 0):
            places = [i for i, group in enumerate(batch.groups) if group.uniform]
            if not places:
                break
            avoid = [group.number for group in batch.seen]
            fresh = self.sampler.draw(len(places), step, avoid)
            drawn += fresh
            others = self._complete(batch, fresh)
            batch.rounds += 1
            batch.seen += others
            for place, other in zip(places, others, strict=True):
                if not other.uniform:
                    right = batch.groups[place].success == 1.0
                    batch.replaced_right += right
                    batch.replaced_wrong += not right
                    batch.groups[place] = other
        return batch

    def _complete(self, batch: RolloutBatch, numbers: Sequence[int]) -> list[Group]:
        size = self._stage.group_size
        first = len(batch.seen) * size  # completions asked for in this step so far: seeds count on from them
        start = time.perf_counter()
        rows = [self._rows[number] for number in numbers]
        requests = []
        for row in rows:
            prompt_ids = self._tokenize(row)
            for _ in range(size):
                seed = derive_seed(self._seed, self._stage.name, batch.step, first + len(requests))
                requests.append(Request(prompt_ids, seed))
        completions = self._pool.generate(requests, self._params, any_version=self._stage.max_staleness > 0)
        done = time.perf_counter()
        batch.generate_s += done - start
        golds = [row["answer"] for row in rows for _ in range(size)]
        texts = [self._decode(completion.token_ids) for completion in completions]
        verdicts = self._verify(list(zip(texts, golds, strict=True)))
        batch.verify_s += time.perf_counter() - done
        return [
            Group(number, row, completions[i : i + size], verdicts[i : i + size])
            for number, row, i in zip(numbers, rows, range(0, len(completions), size), strict=True)
        ]


class RolloutQueue:
    """Batches in order of steps; those of the next `max_staleness` steps are made while one is trained on.

    A batch for step t is ordered when step t - max_staleness begins, so that no token in it is drawn by a policy more
    than `max_staleness` versions older than the one that step t starts from. With 0 that is the synchronous algorithm.
    """

    def __init__(self, maker: BatchMaker, stage: RLVRStage):
        self._maker, self._stage = maker, stage
        self._drawn: dict[int, list[int]] = {}  # by step: the problems drawn for batches that nobody has taken yet
        self._making: dict[int, Future[RolloutBatch]] = {}
        self._threads = ThreadPoolExecutor(stage.max_staleness + 1) if stage.overlapped else None

    def take(self, step: int) -> tuple[RolloutBatch, float]:
        """The batch of `step`, and the seconds that the caller waited for it. Orders the steps that may run ahead."""
        last = min(step + self._stage.max_staleness, self._stage.steps)
        for ahead in range(step, last + 1):
            if ahead not in self._drawn:
                self._order(ahead)
        drawn = self._drawn.pop(step)
        start = time.perf_counter()
        batch = self._making.pop(step).result() if self._threads is not None else self._maker.make(step, drawn)
        for group in batch.seen:
            if group.success is not None:
                self._maker.sampler.report(group.number, group.success)
        return batch, time.perf_counter() - start

    def _order(self, step: int) -> None:
        drawn = self._drawn[step] = self._maker.sampler.draw(self._stage.prompts_per_step, step)
        if self._threads is not None:
            self._making[step] = self._threads.submit(self._maker.make, step, drawn)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the sampler, and which problems are being completed for steps to come."""
        pending = [number for step in sorted(self._drawn) for number in self._drawn[step]]
        return {"sampler": self._maker.sampler.state(), "pending": pending}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`: what was under way is done again, before anything else is drawn."""
        self._maker.sampler.load(state["sampler"])
        self._maker.sampler.give_back(state["pending"])

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
