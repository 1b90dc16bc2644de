"""What a rollout engine is: prompts in, sampled tokens with their log-probs out, at a known policy version."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled. `temperature=0` is greedy decoding; its log-probs are those at temperature 1."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Request:
    """One completion to generate. The same `seed` gives the same tokens whatever else is in the batch."""

    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    `token_ids` holds the sampled tokens, the stop token included when `finish_reason` is "stop". `logprobs` holds,
    for each of them, the natural log of the probability it was drawn with: after temperature and top-p.
    `policy_version` is the version of the weights that drew the tokens: the oldest one, if the completion was gone on
    with after an update. Then `segments` holds (version, number of tokens) in order; else it is empty.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    policy_version: int
    segments: tuple[tuple[int, int], ...] = ()

    def token_versions(self) -> list[int]:
        """The policy version that drew each token."""
        segments = self.segments or ((self.policy_version, len(self.token_ids)),)
        return [version for version, count in segments for _ in range(count)]


class RolloutEngine(Protocol):
    """A model that generates. One engine lives in one `RolloutWorker` actor and is used from one thread."""

    policy_version: int

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Complete every request, in order. Raises `RuntimeError` while a weight update is incomplete."""
        ...

    def begin_update(self) -> None:
        """Start a weight update: drop every cache; from here until `finish_update`, `generate` is refused."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load named tensors under their checkpoint names, whole layers at a time (see `model/naming.py`)."""
        ...

    def finish_update(self, version: int) -> None:
        """Finish the update and serve `version`."""
        ...

    def checksums(self) -> dict[str, int]:
        """Checksum of every tensor that is being served, by checkpoint name."""
        ...

    def close(self) -> None: ...
