"""What a distill stage measures on held-out texts: perplexities of both models, and the errors of the layers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from kimi_rl.kernels.logprob import token_logprobs
from kimi_rl.learner.distill_trainers import error_columns, match_layers
from kimi_rl.learner.packing import Pack, packed_states
from kimi_rl.learner.stage import StageContext
from kimi_rl.learner.teacher import Teacher
from kimi_rl.learner.texts import Texts, rows_in_order


class Exam:
    """What is measured on held-out texts: both models' perplexities, and the layers' errors where these are matched."""

    def __init__(self, context: StageContext, teacher: Teacher, held_out: Texts, autocast: Callable[[], Any]):
        self._context, self._teacher, self._autocast = context, teacher, autocast
        self._texts = held_out
        self._rows = rows_in_order(held_out.lengths, context.stage.pack_tokens)
        self._teacher_perplexity: float | None = None  # it does not change

    def hold(self, step: int, when: str, *, accuracy: bool) -> dict[str, Any]:
        """Measure the current weights and record the figures; returns them. `accuracy`: the stage's `eval` as well."""
        context, start = self._context, time.perf_counter()
        if self._teacher_perplexity is None:
            self._teacher_perplexity = perplexity(self.packs(), self._score_teacher)
        found: dict[str, Any] = {
            "student_perplexity": perplexity(self.packs(), self._score_student),
            "teacher_perplexity": self._teacher_perplexity,
        }
        if context.stage.match == "layers":
            found |= error_columns(self._layer_errors())
        if not accuracy:
            context.record("eval", step, when=when, eval_s=time.perf_counter() - start, **found)
            return found
        return found | asdict(context.evaluate(step, step, when, **found))

    def packs(self) -> Iterable[Pack]:
        return (self._texts.pack(row, self._context.job.device) for row in self._rows)

    def _score_student(self, pack: Pack) -> torch.Tensor:
        model = self._context.model
        with self._autocast():
            states = packed_states(model, pack)[pack.scored_places]
        return token_logprobs(states, model.lm_head.weight, pack.scored_tokens, with_entropy=False)[0]

    def _score_teacher(self, pack: Pack) -> torch.Tensor:
        states = self._teacher.run(pack)[pack.scored_places]
        return token_logprobs(states, self._teacher.head, pack.scored_tokens, with_entropy=False)[0]

    @torch.no_grad()
    def _layer_errors(self) -> list[float]:
        """Mean over the rows, weighted by their tokens."""
        total, tokens = 0.0, 0
        for pack in self.packs():
            errors: list[torch.Tensor] = []
            match_layers(self._context.model, self._teacher, pack, self._autocast, errors.append)
            total = total + torch.stack(errors) * pack.segments.length
            tokens += pack.segments.length
        return (total / tokens).tolist()


@torch.no_grad()
def perplexity(packs: Iterable[Pack], score: Callable[[Pack], torch.Tensor]) -> float:
    """exp of the mean negative log-likelihood per scored token; `score` gives the log-probs [S] of a row."""
    total, count = 0.0, 0
    for pack in packs:
        total = total - score(pack).double().sum()
        count += len(pack.scored_tokens)
    return math.exp(float(total) / count)
