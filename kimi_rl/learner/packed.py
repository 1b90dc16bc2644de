"""Log-probs of the learner on packed rows: a mixin for `trl.GRPOTrainer`.

Old policy, reference and policy all get their log-probs from `_get_per_token_logps_and_entropies`, so the three run the
same kernels. TRL's own method forwards the padded batch; this one takes the padding out, packs what is left, and puts
the scores back where TRL expects them. A loss over several packs has its backward pack by pack.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from kimi_rl.learner.packing import Pack, Sample, pack, plan, regroup, scatter, unpad, whole_rows
from kimi_rl.learner.silent import fill_left_out
from kimi_rl.model.flops import ForwardCost, forward_cost

Packing = Literal["auto", "off", "packed", "shared_prompt"]

# Of a micro-batch of TRL's: what a pack is made of.
_PADDED = ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")


@dataclass(frozen=True)
class PackingSettings:
    """How the learner packs: `mode`, and the tokens of one pack, which bound the activations held at a time."""

    mode: Literal["off", "packed", "shared_prompt"]
    tokens: int

    @classmethod
    def resolve(cls, packing: Packing, tokens: int) -> PackingSettings:
        """`auto` is `packed`: on a CPU too it is the faster path (docs/packing.md has the figures)."""
        return cls("packed" if packing == "auto" else packing, tokens)


@dataclass
class _Turns:
    """The packs of a loss, run one at a time.

    groups: the samples of each, None for a pack without any. logps, entropies float32 [B, C]: what is known so far, and
    something in place of the rest. run: bool [B], the rows that are in any pack; None: all. number: whose turn it is.
    """

    groups: list[list[Sample] | None]
    logps: torch.Tensor
    entropies: torch.Tensor
    run: torch.Tensor | None = None
    number: int = 0

    @property
    def last(self) -> bool:
        """Whether it is the last pack's turn, after which all is known."""
        return self.number == len(self.groups) - 1

    @property
    def scored(self) -> int:
        """Tokens of all packs."""
        return sum(len(sample.completion) for group in self.groups for sample in group or ())


@dataclass
class _OnHost:
    """ids, mask [B, T] of a micro-batch; run: bool [B], the rows that its update has to run, None for all."""

    ids: torch.Tensor
    mask: torch.Tensor
    run: torch.Tensor | None = None


class PackedLogps:
    """Trainer mixin, to stand before `GRPOTrainer`. Set `packing` before the trainer's own `__init__` runs.

    The token budget of a pack bounds memory: of a loss's packs, each has its forward and its backward before the next
    one is run. Elsewhere (`_separable`), a forward that needs several packs and records gradients keeps the activations
    of none of them and computes each pack again in the backward, at the price of one more forward.
    """

    packing = PackingSettings("off", 0)
    _turns: _Turns | None = None  # while a loss is computed pack by pack
    # Of each micro-batch its tensors, and what of it is on the host; and the latter of the one whose loss is next.
    _copies: Sequence[tuple[list[torch.Tensor], _OnHost]] = ()
    _copied: _OnHost | None = None

    @functools.cached_property
    def _pack_cost(self) -> ForwardCost:
        return forward_cost(self.accelerator.unwrap_model(self.model).config)

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        """TRL shuffles the rows of a rollout batch over its micro-batches; to share prompts, groups stay together."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        fresh = self.model.training and self._buffered_inputs is not before
        if self.packing.mode == "off" or not fresh:
            return inputs
        if self.packing.mode == "shared_prompt":
            self._buffered_inputs = regroup(self._buffered_inputs)
        self.copy_to_host(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def copy_to_host(self, micro_batches: list[dict[str, Any]]) -> None:
        """Read the tokens and masks of a rollout batch from the card, once and before any of it is trained on.

        Later the read would wait for all that the card still has to do: the micro-batch before would have to be through
        before the host begins to lay this one out, and the card would then wait for the host.
        """
        self._copies = []
        for part in micro_batches:
            ids, mask, _ = whole_rows({name: part[name].cpu() for name in _PADDED})
            self._copies.append(([part[name] for name in _PADDED], _OnHost(ids, mask, self.rows_run(part))))

    def rows_that_count(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """bool [B], the rows of a micro-batch whose log-probs the loss's gradient depends on, and maybe others; None:
        all. To be overridden."""
        return None

    def rows_run(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """bool [B] on the host, the rows of a micro-batch that its update runs; None for all."""
        rows = self.rows_that_count(inputs)
        return None if rows is None or self.packing.mode == "off" or not self._separable else rows.cpu()

    def compute_loss(self, model, inputs, *args: Any, **kwargs: Any):
        for tensors, copied in self._copies:
            if all(inputs.get(name) is tensor for name, tensor in zip(_PADDED, tensors, strict=True)):
                self._copied = copied
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self._copied = None

    def policy_loss(self, model, inputs) -> torch.Tensor:
        """The loss of a micro-batch, for which log-probs are asked once: TRL's. To be overridden instead of
        `_compute_loss` by a loss of one's own that is a sum over samples."""
        return super()._compute_loss(model, inputs)

    def _compute_loss(self, model, inputs) -> torch.Tensor:
        """`policy_loss`, whose gradients through all packs but the last have been taken when it returns.

        A sum over samples has, by the log-probs of one pack, the same gradient whatever the others' are. So the loss is
        computed once a pack: with gradients through this pack's log-probs, and with what is known, or the old
        policy's or the engine's, in place of the others'. The last time all are known; that loss is recorded.
        """
        if self.packing.mode == "off" or not torch.is_grad_enabled() or not self._separable:
            return self.policy_loss(model, inputs)
        known = inputs.get("old_per_token_logps", inputs.get("sampling_per_token_logps"))
        if known is None:
            known = torch.zeros_like(inputs["completion_mask"], dtype=torch.float32)
        known = known.nan_to_num()  # an engine may have told none
        run = self._copied.run if self._copied else self.rows_run(inputs)
        groups = self._planned(*whole_rows(inputs), run) or [None]
        self._turns = turns = _Turns(groups, known, torch.zeros_like(known), run)
        try:
            while not turns.last:
                with self._unrecorded():
                    loss = self.policy_loss(model, inputs)
                self.accelerator.backward(loss)
                turns.number += 1
            return self.policy_loss(model, inputs)
        finally:
            self._turns = None

    @property
    def _separable(self) -> bool:
        """Whether the loss is a sum over samples, and a second call of it changes nothing but metrics.

        Not with a router's balancing loss, tokens chosen by the entropies of all, or TRL's entropy bonus, which counts.
        """
        return not self.aux_loss_enabled and self.top_entropy_quantile >= 1 and not self._entropy_bonus_enabled

    @contextlib.contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """What TRL's loss adds to its metrics meanwhile is dropped."""
        kept, self._metrics = self._metrics, {mode: defaultdict(list) for mode in self._metrics}
        try:
            yield
        finally:
            self._metrics = kept

    def _in_turn(self, model, turns: _Turns, with_entropy: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs and entropies [B, C] of all samples, with gradients through those of the pack whose turn it is."""
        packed = self._pack(turns.groups[turns.number], turns.logps.device)
        logps, entropies = self._score(model, with_entropy, packed)
        places = packed.rows, packed.columns
        logps = turns.logps.index_put(places, logps)
        turns.logps = logps.detach()
        if entropies is not None:
            entropies = turns.entropies.index_put(places, entropies)
            turns.entropies = entropies.detach()
            if turns.run is not None and turns.last:
                entropies = fill_left_out(entropies, turns.run.to(entropies.device), turns.scored)
        return logps, entropies

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
        if self._turns is not None:
            return *self._in_turn(model, self._turns, compute_entropy), None
        groups = self._planned(input_ids, attention_mask, logits_to_keep)
        again = torch.is_grad_enabled() and len(groups) > 1
        run = functools.partial(self._score, model, compute_entropy)
        packs, scores = [], []
        for group in groups or [None]:  # one after another: while the card works on one, the host lays out the next
            packs.append(self._pack(group, input_ids.device))
            scores.append(checkpoint(run, packs[-1], use_reentrant=False) if again else run(packs[-1]))
        shape = (len(input_ids), logits_to_keep)
        logps = scatter([logps for logps, _ in scores], packs, shape)
        entropies = scatter([entropies for _, entropies in scores], packs, shape) if compute_entropy else None
        return logps, entropies, None

    def _planned(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_width: int,
        run: torch.Tensor | None = None,
    ) -> list[list[Sample]]:
        """The samples of each pack; of the rows `run` alone, bool [B] on the host, where it is given."""
        copied = self._copied or _OnHost(input_ids.cpu(), attention_mask.cpu())
        self._copied = None  # of the policy's own pass, the first that a loss asks for
        samples = unpad(copied.ids, copied.mask, completion_width)
        if run is not None:
            samples = [sample for sample in samples if run[sample.row]]
        share = self.packing.mode == "shared_prompt"
        return plan(samples, self.packing.tokens, self._pack_cost, share_prompts=share)

    def _pack(self, samples: list[Sample] | None, device: torch.device) -> Pack:
        """Without samples, every completion being masked out, a pack that scores nothing: a backward needs a graph."""
        if samples is None:
            two = torch.zeros(2, dtype=torch.long)
            only = Sample(0, two[:1], two[1:], two[:1], b"")
            return without_scores(pack([only], share_prompts=False, device=device))
        return pack(samples, share_prompts=self.packing.mode == "shared_prompt", device=device)

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
