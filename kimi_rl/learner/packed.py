"""Log-probs of the learner on packed rows: a mixin for `trl.GRPOTrainer`.

Old policy, reference and policy all get their log-probs from `_get_per_token_logps_and_entropies`, so the three run the
same kernels. TRL's own method forwards the padded batch; this one takes the padding out, packs what is left, and puts
the scores back where TRL expects them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from kimi_rl.learner.packing import Pack, pack, plan, regroup, scatter, unpad
from kimi_rl.model.flops import ForwardCost, forward_cost

Packing = Literal["auto", "off", "packed", "shared_prompt"]


@dataclass(frozen=True)
class PackingSettings:
    """How the learner packs: `mode`, and the tokens of one pack, which bound the activations held at a time."""

    mode: Literal["off", "packed", "shared_prompt"]
    tokens: int

    @classmethod
    def resolve(cls, packing: Packing, tokens: int) -> PackingSettings:
        """`auto` is `packed`: on a CPU too it is the faster path (docs/packing.md has the figures)."""
        return cls("packed" if packing == "auto" else packing, tokens)


class PackedLogps:
    """Trainer mixin, to stand before `GRPOTrainer`. Set `packing` before the trainer's own `__init__` runs.

    A forward that needs several packs and records gradients keeps the activations of none of them and computes each
    pack again in the backward: the token budget then bounds memory, at the price of one more forward.
    """

    packing = PackingSettings("off", 0)

    @functools.cached_property
    def _pack_cost(self) -> ForwardCost:
        return forward_cost(self.accelerator.unwrap_model(self.model).config)

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        """TRL shuffles the rows of a rollout batch over its micro-batches; to share prompts, groups stay together."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        fresh = self.model.training and self._buffered_inputs is not before
        if self.packing.mode != "shared_prompt" or not fresh:
            return inputs
        self._buffered_inputs = regroup(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As TRL's: input_ids, attention_mask [B, T] -> logps and entropies [B, logits_to_keep] in float32, and None.

        `batch_size` has no meaning here: packs are cut by tokens. A router's balancing loss and images take TRL's path.
        """
        if self.packing.mode == "off" or compute_aux_loss or any(value is not None for value in images.values()):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **images,
            )
        packs = self._packs(input_ids, attention_mask, logits_to_keep)
        again = torch.is_grad_enabled() and len(packs) > 1
        run = functools.partial(self._score, model, compute_entropy)
        scores = [checkpoint(run, p, use_reentrant=False) if again else run(p) for p in packs]
        shape = (len(input_ids), logits_to_keep)
        logps = scatter([logps for logps, _ in scores], packs, shape)
        entropies = scatter([entropies for _, entropies in scores], packs, shape) if compute_entropy else None
        return logps, entropies, None

    def _packs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_width: int) -> list[Pack]:
        ids, mask = input_ids.cpu(), attention_mask.cpu()
        samples = unpad(ids, mask, completion_width)
        if not samples:
            # Every completion is masked out. Two tokens are run for nothing, so that a backward has a graph.
            mask = torch.zeros_like(mask)
            mask[0, -completion_width - 1 : -completion_width + 1 or None] = 1
            empty = pack(unpad(ids[:1], mask[:1], completion_width), share_prompts=False, device=input_ids.device)
            return [without_scores(empty)]
        share = self.packing.mode == "shared_prompt"
        groups = plan(samples, self.packing.tokens, self._pack_cost, share_prompts=share)
        return [pack(group, share_prompts=share, device=input_ids.device) for group in groups]

    def _score(self, model, with_entropy: bool, packed: Pack) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self.accelerator.autocast():
            scores = model(
                input_ids=packed.input_ids,
                position_ids=packed.positions,
                segments=packed.segments,
                scored_places=packed.scored_places,
                scored_tokens=packed.scored_tokens,
                temperature=self.temperature,
                with_entropy=with_entropy,
                use_cache=False,
            )
        return scores.logps, scores.entropies


def without_scores(packed: Pack) -> Pack:
    """The same row with nothing to score."""
    none = packed.rows[:0]
    return Pack(packed.input_ids, packed.segments, packed.positions, none, none, none, none)
