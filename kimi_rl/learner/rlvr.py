"""The RLVR learner: a trl.GRPOTrainer whose completions come from the rollout workers.

TRL keeps the advantages, losses, logging and checkpoints. Overridden here: where prompts and completions come from,
K1.5's loss and the supervised (PTX) term, how many optimizer steps a rollout batch gets, and what is recorded.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch.utils.data import Sampler

from kimi_rl.learner.controllers import Controllers
from kimi_rl.learner.one_pass import SWITCH as ONE_PASS
from kimi_rl.learner.one_pass import OnePass
from kimi_rl.learner.packed import PackedLogps, PackingSettings
from kimi_rl.learner.packing import whole_rows
from kimi_rl.learner.ptx import PTXStream
from kimi_rl.learner.reward import RecipeReward
from kimi_rl.learner.silent import ALWAYS, rows_to_run
from kimi_rl.learner.silent import SWITCH as SKIP_SILENT
from kimi_rl.learner.stage import CheckpointNames, StageContext
from kimi_rl.learner.trl_trainers import GRPOConfig, GRPOTrainer, add_fused_lm_head
from kimi_rl.mismatch import Mismatch, MismatchBar, measure_mismatch
from kimi_rl.model.load_save import load_model
from kimi_rl.objective import drift_kl, k15_loss, ptx_loss
from kimi_rl.recipe import RLVRStage
from kimi_rl.rewards.shaping import k15_length_rewards
from kimi_rl.rollout.batches import RolloutBatch, RolloutQueue
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.seeds import derive_seed
from kimi_rl.switches import is_on

STATUSES = ("correct", "wrong", "no_answer", "unparseable_gold", "timeout", "crashed")

_DRIFT_SAMPLES = ALWAYS  # completions on which a step's movement of the policy is measured
_PROBE_PROMPTS = 8  # completions drawn to compare engine and trainer where a batch has no fresh tokens
_PROBE_TOKENS = 64


class Placeholders(Sampler):
    """What the trainer's data loader walks over: row 0, as often as it asks. The rows come from the rollout queue."""

    def __init__(self, length: int):
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self):
        return iter([0] * self._length)


def length_reward_weight(stage: RLVRStage, step: int) -> float:
    """Weight of the length reward at `step` (from 1): 0 during the warm-up, then growing over as many steps again."""
    if stage.length_reward is None:
        return 0.0
    warmup = stage.length_reward.warmup_steps
    grown = 1.0 if warmup == 0 else min(1.0, max(0.0, (step - warmup) / warmup))
    return stage.length_reward.weight * grown


def shaped_rewards(batch: RolloutBatch, weight: float) -> list[float | None]:
    """The verdicts' values, plus `weight` times K1.5's length reward within each group."""
    rewards = []
    for group in batch.groups:
        correct = [verdict.status == "correct" for verdict in group.verdicts]
        lengths = k15_length_rewards([len(c.token_ids) for c in group.completions], correct)
        for verdict, length in zip(group.verdicts, lengths, strict=True):
            rewards.append(None if verdict.value is None else verdict.value + weight * length)
    return rewards


def fresh_mask(mask: torch.Tensor, ages: list[list[int]]) -> torch.Tensor:
    """mask [B, T] of the completions, less the tokens that an older policy version drew. ages: of each one's tokens."""
    if not any(any(row) for row in ages):
        return mask
    old = torch.tensor([[age > 0 for age in row] + [True] * (mask.size(1) - len(row)) for row in ages])
    return mask * ~old.to(mask.device)


class RLVRLearner(CheckpointNames, OnePass, PackedLogps, GRPOTrainer):
    """`trl.GRPOTrainer` with rollouts from a `RolloutQueue`, verified weight sync, and the mismatch gate.

    One step of the trainer is one rollout batch: `state.global_step` counts batches trained on and is the policy
    version. The optimizer steps within it are taken here (see `training_step`).
    """

    def __init__(
        self,
        *,
        context: StageContext,
        args: GRPOConfig,
        queue: RolloutQueue,
        ptx: PTXStream | None = None,
        **kwargs: Any,
    ):
        self.context = context
        self.rlvr: RLVRStage = context.stage
        self.queue = queue
        self.ptx = ptx
        self.controllers = Controllers(self.rlvr)
        self.optimizer_steps = 0  # of this stage
        self.packing = PackingSettings.resolve(self.rlvr.packing, self.rlvr.pack_tokens)
        self.bar = MismatchBar(self.rlvr.mismatch.max_kl, self.rlvr.mismatch.patience)
        self.step_values: dict[str, Any] = {}
        self._batch: RolloutBatch | None = None
        self._reward = RecipeReward(context.recipe.reward, max_length=self.rlvr.rollout.max_tokens)
        self._busy_before: tuple[float, float] | None = None
        super().__init__(args=args, reward_funcs=self._reward, **kwargs)
        # TRL corrects the importance of tokens drawn by another engine only when it believes that engine to be its own
        # vLLM client. Ours is the rollout pool: `_generate_single_turn` below is the only place TRL would use it.
        self.use_vllm = True
        self.vllm_importance_sampling_correction = True
        if not self.rlvr.importance_sampling.enabled:
            # Keep measuring the ratio, but clamp it to one.
            self.vllm_importance_sampling_mode = "token_truncate"
            self.vllm_importance_sampling_clip_min = self.vllm_importance_sampling_clip_max = 1.0
        if self.rlvr.beta > 0:
            self._attach_reference()

    def _attach_reference(self) -> None:
        """The reference policy is the stage's starting model, in our own class (TRL would build transformers' own)."""
        reference = load_model(self.context.job.start_model, dtype=torch.float32, device=self.context.job.device)
        reference.requires_grad_(False).eval()
        add_fused_lm_head(reference, temperature=self.temperature)
        self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.beta = self.rlvr.beta

    def _get_train_sampler(self, dataset=None) -> Sampler:
        return Placeholders(self.rlvr.steps * self.args.steps_per_generation * self.rlvr.completions_per_step)

    # --- rollouts ---------------------------------------------------------------------------------------------

    @property
    def rollout_step(self) -> int:
        """Number of the current rollout batch, from 1."""
        return self.state.global_step + 1

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        step, version = self.rollout_step, self.state.global_step
        sync_s = self.context.sync(version)
        batch, wait_s = self.queue.take(step)
        self._batch = batch
        weight = length_reward_weight(self.rlvr, step)
        self._reward.expect(shaped_rewards(batch, weight), batch.verdicts)
        if self.rlvr.beta > 0 and self.rlvr.loss_type != "k15":
            self.beta = self.controllers.kl_coefficient
        one_pass = self.controllers.updates == 1 and is_on(ONE_PASS)
        with self.scoring(one_pass):
            output = super()._generate_and_score_completions(batch.rows)
        ages = [[version - drawn for drawn in completion.token_versions()] for completion in batch.completions]
        output["fresh_mask"] = fresh_mask(output["completion_mask"], ages)
        counts = Counter(age for row in ages for age in row)
        self.step_values = {
            "policy_version": version,
            "sync_s": sync_s,
            "wait_s": wait_s,
            "rollout_s": batch.generate_s,
            "verify_s": batch.verify_s,
            "rollout_tokens": batch.tokens,
            "rollout_tokens_per_s": batch.tokens / batch.generate_s,
            "batch_tokens": int(output["prompt_mask"].sum() + output["completion_mask"].sum()),
            "updates": self.controllers.updates,
            "kl_coefficient": self.controllers.kl_coefficient,
            "staleness_mean": sum(age * count for age, count in counts.items()) / max(1, counts.total()),
            "staleness_max": max(counts, default=0),
            "staleness_tokens": {str(age): count for age, count in sorted(counts.items())},
            "effective_share": (output["advantages"] != 0).double().mean().item(),
            "worker_idle_share": self._idle_share(),
            **self._verdict_values(batch),
            **self._reward.term_means(),
        }
        if not one_pass:
            self.step_values |= self._mismatch_values(output)
        if self.rlvr.length_reward is not None:
            self.step_values["length_reward_weight"] = weight
        if self.rlvr.dynamic_sampling is not None:
            self.step_values |= {
                "sampling_rounds": batch.rounds,
                "sampling_groups": len(batch.seen),
                "sampling_replaced_right": batch.replaced_right,
                "sampling_replaced_wrong": batch.replaced_wrong,
            }
        self._write_rollouts(batch, output["advantages"].tolist())
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """What TRL takes for generation: the batch's token ids and sampling log-probs, one list per prompt."""
        completions = self._batch.completions
        return [c.token_ids for c in completions], [c.logprobs for c in completions]

    def _verdict_values(self, batch: RolloutBatch) -> dict[str, float]:
        counts = Counter(v.status for v in batch.verdicts)
        scored = [v.value for v in batch.verdicts if v.value is not None]
        return {
            "accuracy": sum(scored) / len(scored) if scored else 0.0,
            **{f"verdict_{status}": counts[status] for status in STATUSES},
        }

    def _idle_share(self) -> float | None:
        """Share of the workers' time since the last batch in which they generated nothing."""
        now, (busy, workers) = time.perf_counter(), self.context.pool.busy_seconds()
        before, self._busy_before = self._busy_before, (now, busy)
        if before is None or now <= before[0]:
            return None
        return min(1.0, max(0.0, 1.0 - (busy - before[1]) / (workers * (now - before[0]))))

    # --- mismatch ---------------------------------------------------------------------------------------------

    def _mismatch_values(self, scored: dict[str, torch.Tensor]) -> dict[str, float]:
        """Trainer against engine, on tokens that the trainer's own version drew: older ones differ for good reason."""
        trainer, engine = scored["old_per_token_logps"], scored["sampling_per_token_logps"]
        mask, fresh = scored["completion_mask"], scored["fresh_mask"]
        cap = self.rlvr.importance_sampling.cap
        whole = measure_mismatch(trainer, engine, mask, cap)
        values: dict[str, float] = {"is_truncated_share": whole.truncated_share}
        if self.rlvr.max_staleness:
            values["off_policy_kl"] = whole.kl
        if bool(fresh.any()):
            mismatch = whole if bool((fresh == mask).all()) else measure_mismatch(trainer, engine, fresh, cap)
        elif (self.rollout_step - 1) % self.rlvr.mismatch.probe_every == 0:
            mismatch = self._probe(self._batch)
        else:
            return values
        self.bar.check(mismatch, self.rollout_step)
        return values | {
            "mismatch_kl": mismatch.kl,
            "mismatch_mean_abs": mismatch.mean_abs,
            "mismatch_max_abs": mismatch.max_abs,
            "mismatch_ratio_p01": mismatch.ratio_p01,
            "mismatch_ratio_p99": mismatch.ratio_p99,
        }

    def _probe(self, batch: RolloutBatch) -> Mismatch:
        """A few completions drawn for nothing but this comparison, with the version that the trainer holds."""
        rollout = self.rlvr.rollout
        params = SamplingParams(min(rollout.max_tokens, _PROBE_TOKENS), rollout.temperature, rollout.top_p)
        requests = [
            Request(self.context.prompt_ids(row["prompt"]), derive_seed("probe", self.rollout_step, i))
            for i, row in enumerate(batch.rows[:: self.rlvr.group_size][:_PROBE_PROMPTS])
        ]
        completions = self.context.pool.generate(requests, params)
        total = max(len(r.prompt_ids) for r in requests)
        longest = max(len(c.token_ids) for c in completions)
        device = self.accelerator.device
        ids = torch.full((len(requests), total + longest), self.processing_class.pad_token_id, device=device)
        mask = torch.zeros_like(ids)
        engine = torch.zeros((len(requests), longest), device=device)
        for row, (request, completion) in enumerate(zip(requests, completions, strict=True)):
            start, count = total - len(request.prompt_ids), len(completion.token_ids)
            ids[row, start : total + count] = torch.tensor([*request.prompt_ids, *completion.token_ids], device=device)
            mask[row, start : total + count] = 1
            engine[row, :count] = torch.tensor(completion.logprobs, device=device)
        with torch.no_grad():
            trainer, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, mask, longest)
        return measure_mismatch(trainer, engine, mask[:, total:], self.rlvr.importance_sampling.cap)

    # --- the update -------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; at the end of each of the batch's `updates` parts but the last, an optimizer step.

        The last part's step is the trainer's own, which also moves the schedule on: it counts rollout batches.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        parts, micro_batches = self.controllers.updates, self.args.steps_per_generation
        done = (self._step - 1) % micro_batches + 1
        if done < micro_batches and done % (micro_batches // parts) == 0:
            self._optimizer_step(model)
        if done % (micro_batches // parts) == 0:
            self.optimizer_steps += 1
        if done == micro_batches and self.one_pass:
            self._look_at_scores()
        return loss

    def _look_at_scores(self) -> None:
        """What is measured in log-probs of the policy before the step, in time for the gate to prevent it."""
        names = ("old_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio", "completion_mask")
        micro_batches = self._buffered_inputs
        scored = {name: torch.cat([part[name] for part in micro_batches]) for name in (*names, "fresh_mask")}
        runs = [self.rows_run(part) for part in micro_batches]
        if runs[0] is not None:  # nothing is known of the others
            run = torch.cat(runs).to(scored["fresh_mask"].device)
            scored = {name: value[run] for name, value in scored.items()}
        self.step_values |= self._mismatch_values(scored)
        ratio = scored["importance_sampling_ratio"]
        ratio = ratio[scored["completion_mask"].bool()] if ratio.size(1) > 1 else ratio
        mean = ratio.double().mean().item() if ratio.numel() else 0.0
        self._metrics["train"]["sampling/importance_sampling_ratio/mean"].append(mean)

    def _optimizer_step(self, model) -> None:
        # accelerate leaves the optimizer alone while it believes gradients to be accumulating.
        gradients = self.accelerator.gradient_state
        before = gradients.sync_gradients
        gradients._set_sync_gradients(True)
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        model.zero_grad()
        gradients._set_sync_gradients(before)

    def rows_that_count(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """With a KL term, and in K1.5's loss, every completion counts."""
        if self.rlvr.beta > 0 or self.rlvr.loss_type == "k15" or not is_on(SKIP_SILENT):
            return None
        return rows_to_run(inputs["advantages"])

    def policy_loss(self, model, inputs):
        """TRL's loss, or K1.5's where the recipe says so."""
        loss = self._k15_loss(model, inputs) if self.rlvr.loss_type == "k15" else super().policy_loss(model, inputs)
        # TRL averages over all micro-batches of a rollout batch; an optimizer step averages over those of its part.
        return loss * self.controllers.updates

    def _compute_loss(self, model, inputs):
        """The policy's loss; plus the supervised term, once per optimizer step."""
        loss = super()._compute_loss(model, inputs)
        part = self.args.steps_per_generation // self.controllers.updates
        if self.ptx is not None and self._step % part == 0:
            loss = loss + self.rlvr.ptx.weight * self._ptx_loss(model)
        return loss

    def _k15_loss(self, model, inputs):
        mask = inputs["completion_mask"]
        logps, entropies, _ = self._logps(model, inputs, compute_entropy=True)
        loss = k15_loss(
            logps,
            inputs["old_per_token_logps"],
            mask,
            inputs["advantages"],
            tau=self.controllers.kl_coefficient,
            weights=inputs["importance_sampling_ratio"],
        )
        self._metrics["train"]["entropy"].append(((entropies * mask).sum() / mask.sum()).item())
        return loss / self.current_gradient_accumulation_steps

    def _logps(self, model, inputs, **kwargs: Any):
        return self._get_per_token_logps_and_entropies(model, *whole_rows(inputs), **kwargs)

    def _ptx_loss(self, model) -> torch.Tensor:
        device = self.accelerator.device
        batch = {name: value.to(device) for name, value in self.ptx.batch(self.optimizer_steps).items()}
        labels = batch.pop("labels")
        with self.accelerator.autocast():
            logits = model(**batch, use_cache=False).logits
        loss = ptx_loss(logits, labels)
        self._metrics["train"]["ptx_loss"].append(loss.item())
        return loss

    # --- after the update -------------------------------------------------------------------------------------

    def end_step(self) -> None:
        """Let the controllers see what the step did. Called after the batch's last optimizer step, before logging."""

        def mean(name: str) -> float:
            values = self._metrics["train"].get(name, [])
            return sum(values) / len(values) if values else float("nan")

        drift = self._measure_drift() if self.controllers.needs_drift else float("nan")
        changes = self.controllers.step(drift=drift, reference_kl=mean("kl"), entropy=mean("entropy"))
        if self.controllers.needs_drift:
            self.step_values["drift_kl"] = drift
        if changes:
            self.step_values["controller_changes"] = changes
            self.context.record("note", self.state.global_step, text="; ".join(changes))

    def _measure_drift(self) -> float:
        rows = {name: value[:_DRIFT_SAMPLES] for name, value in self._buffered_inputs[0].items() if value.dim()}
        with torch.no_grad():
            new, _, _ = self._logps(self.model, rows)
        return drift_kl(rows["old_per_token_logps"], new, rows["completion_mask"])

    def rollout_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside model, optimizer and scheduler."""
        return {
            "queue": self.queue.state(),
            "controllers": self.controllers.state(),
            "optimizer_steps": self.optimizer_steps,
            "bad_mismatch_steps": self.bar.bad_steps,
        }

    def load_rollout_state(self, state: dict[str, Any]) -> None:
        self.queue.load(state["queue"])
        self.controllers.load(state["controllers"])
        self.optimizer_steps = state["optimizer_steps"]
        self.bar.bad_steps = state["bad_mismatch_steps"]

    def _write_rollouts(self, batch: RolloutBatch, advantages: list[float]) -> None:
        rows = [
            {
                "id": row["id"],
                "group": i // self.rlvr.group_size,
                "question": row["question"],
                "completion": self.context.decode(completion.token_ids),
                "gold": row["answer"],
                "parsed": verdict.parsed,
                "status": verdict.status,
                "reason": verdict.reason,
                "reward": reward,
                **self._reward.columns(i),
                "advantage": advantages[i],
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "policy_version": completion.policy_version,
                "logprob_sum": sum(completion.logprobs),
            }
            for i, (row, completion, verdict, reward) in enumerate(
                zip(batch.rows, batch.completions, batch.verdicts, self._reward.rewards, strict=True)
            )
        ]
        self.context.run_dir.write_rollouts(self.rlvr.name, self.rollout_step, rows)
