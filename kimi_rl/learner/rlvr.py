"""The RLVR stage: a trl.GRPOTrainer whose completions come from the rollout workers.

TRL keeps the dataset, advantages, losses, logging and checkpoints. Overridden here: where completions come from, the
order of prompts (so that a resumed run goes on with exactly the next ones), and what is recorded.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from kimi_rl.learner.stage import CheckpointNames, RecordCallback, StageContext
from kimi_rl.mismatch import MismatchBar, measure_mismatch
from kimi_rl.model.load_save import load_model
from kimi_rl.objective import k15_loss
from kimi_rl.recipe import RLVRStage
from kimi_rl.rewards import Verdict
from kimi_rl.rollout.engine import Completion, Request, SamplingParams
from kimi_rl.seeds import derive_seed

STATUSES = ("correct", "wrong", "no_answer", "unparseable_gold", "timeout", "crashed")


class PromptOrder(Sampler):
    """Row numbers for a whole run: each step's prompts, each repeated `group_size` times, once per micro-batch fetch.

    The order is a function of the seed and of the step, so skipping to step n after a restart gives what the
    uninterrupted run had there. TRL fetches the same rollout batch once per micro-batch and keeps its completions.
    """

    def __init__(self, rows: int, *, prompts_per_step: int, group_size: int, fetches: int, steps: int, seed: int):
        self.rows, self.prompts, self.group = rows, prompts_per_step, group_size
        self.fetches, self.steps, self.seed = fetches, steps, seed

    def __len__(self) -> int:
        return self.steps * self.fetches * self.prompts * self.group

    def _stream(self) -> Iterator[int]:
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "prompt order", epoch))
            yield from torch.randperm(self.rows, generator=generator).tolist()
            epoch += 1

    def __iter__(self) -> Iterator[int]:
        stream = self._stream()
        for _ in range(self.steps):
            batch = [row for row in (next(stream) for _ in range(self.prompts)) for _ in range(self.group)]
            for _ in range(self.fetches):
                yield from batch


class VerifiedReward:
    """TRL reward function: one verdict a completion. Keeps the last batch's verdicts for metrics and records.

    A completion whose gold answer cannot be parsed gets no reward at all (None), so that it leaves the batch instead
    of being scored 0.
    """

    __name__ = "verified"

    def __init__(self, context: StageContext):
        self._context = context
        self.verdicts: list[Verdict] = []

    def __call__(self, completions: list, answer: list[str], **_: Any) -> list[float | None]:
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        self.verdicts = self._context.verify(list(zip(texts, answer, strict=True)))
        return [verdict.value for verdict in self.verdicts]


class RLVRLearner(CheckpointNames, GRPOTrainer):
    """`trl.GRPOTrainer` with rollouts from a `RolloutPool`, verified weight sync, and the mismatch gate."""

    def __init__(self, *, context: StageContext, args: GRPOConfig, reward: VerifiedReward, **kwargs: Any):
        self.context = context
        self.rlvr: RLVRStage = context.stage
        self.reward = reward
        self.bar = MismatchBar(self.rlvr.mismatch.max_kl, self.rlvr.mismatch.patience)
        self.step_values: dict[str, Any] = {}
        self._completions: list[Completion] = []
        super().__init__(args=args, reward_funcs=reward, **kwargs)
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
        return PromptOrder(
            len(dataset if dataset is not None else self.train_dataset),
            prompts_per_step=self.rlvr.prompts_per_step,
            group_size=self.rlvr.group_size,
            fetches=self.args.steps_per_generation,
            steps=self.rlvr.steps,
            seed=self.context.recipe.seed,
        )

    # --- rollouts ---------------------------------------------------------------------------------------------

    @property
    def rollout_step(self) -> int:
        """Number of the current rollout batch, from 1."""
        return self.state.global_step // self.rlvr.updates_per_step + 1

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """Ask the rollout workers. Returns token ids and sampling log-probs, one list per prompt."""
        rollout, version = self.rlvr.rollout, self.state.global_step
        sync_s = self.context.sync(version)
        start = time.perf_counter()
        requests = [
            Request(ids, derive_seed(self.context.recipe.seed, self.rlvr.name, self.rollout_step, i))
            for i, ids in enumerate(prompt_ids)
        ]
        self._completions = self.context.pool.generate(
            requests, SamplingParams(rollout.max_tokens, rollout.temperature, rollout.top_p)
        )
        tokens = sum(len(c.token_ids) for c in self._completions)
        rollout_s = time.perf_counter() - start
        self.step_values = {
            "policy_version": version,
            "sync_s": sync_s,
            "rollout_s": rollout_s,
            "rollout_tokens": tokens,
            "rollout_tokens_per_s": tokens / rollout_s,
            "batch_tokens": tokens + sum(len(c) for c in prompt_ids),
        }
        return [c.token_ids for c in self._completions], [c.logprobs for c in self._completions]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mismatch = measure_mismatch(
            output["old_per_token_logps"],
            output["sampling_per_token_logps"],
            output["completion_mask"],
            self.rlvr.importance_sampling.cap,
        )
        verdicts = self.reward.verdicts
        counts = Counter(v.status for v in verdicts)
        scored = [v.value for v in verdicts if v.value is not None]
        self.step_values |= {
            "mismatch_kl": mismatch.kl,
            "mismatch_mean_abs": mismatch.mean_abs,
            "mismatch_max_abs": mismatch.max_abs,
            "mismatch_ratio_p01": mismatch.ratio_p01,
            "mismatch_ratio_p99": mismatch.ratio_p99,
            "is_truncated_share": mismatch.truncated_share,
            "accuracy": sum(scored) / len(scored) if scored else 0.0,
            **{f"verdict_{status}": counts[status] for status in STATUSES},
        }
        self._write_rollouts(inputs, output["advantages"].tolist())
        self.bar.check(mismatch, self.rollout_step)
        return output

    def _compute_loss(self, model, inputs):
        """TRL's loss, or K1.5's where the recipe says so."""
        if self.rlvr.loss_type != "k15":
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"]
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            mask.size(1),
            compute_entropy=True,
        )
        loss = k15_loss(
            logps,
            inputs["old_per_token_logps"],
            mask,
            inputs["advantages"],
            tau=self.rlvr.tau,
            weights=inputs["importance_sampling_ratio"],
        )
        self._metrics["train"]["entropy"].append(((entropies * mask).sum() / mask.sum()).item())
        return loss / self.current_gradient_accumulation_steps

    def _write_rollouts(self, inputs: list[dict[str, Any]], advantages: list[float]) -> None:
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
                "reward": verdict.value,
                "advantage": advantages[i],
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "policy_version": completion.policy_version,
                "logprob_sum": sum(completion.logprobs),
            }
            for i, (row, completion, verdict) in enumerate(
                zip(inputs, self._completions, self.reward.verdicts, strict=True)
            )
        ]
        self.context.run_dir.write_rollouts(self.rlvr.name, self.rollout_step, rows)


def run_rlvr(context: StageContext) -> None:
    """Train, writing metrics, rollouts and checkpoints. On return the context's model holds the final weights."""
    stage: RLVRStage = context.stage
    updates, micro = stage.updates_per_step, stage.micro_batch
    checkpoint = context.prepare_resume(updates_per_step=updates)
    if checkpoint is None:
        context.evaluate(0, 0, "before")
    on_gpu = context.job.device != "cpu"
    args = GRPOConfig(
        output_dir=str(context.folder / "checkpoints"),
        max_steps=stage.steps * updates,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=stage.completions_per_update // micro,
        steps_per_generation=stage.completions_per_step // micro,
        num_generations=stage.group_size,
        max_completion_length=stage.rollout.max_tokens,
        temperature=stage.rollout.temperature,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup_steps * updates,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        loss_type="grpo" if stage.loss_type == "k15" else stage.loss_type,  # k15: RLVRLearner._compute_loss
        scale_rewards=stage.scale_rewards,
        epsilon=stage.epsilon,
        epsilon_high=stage.epsilon_high,
        beta=0.0,  # set by RLVRLearner, with a reference model of our own class
        mask_truncated_completions=stage.mask_truncated,
        vllm_importance_sampling_mode=stage.importance_sampling.mode,
        vllm_importance_sampling_clip_max=stage.importance_sampling.cap,
        # Both sides run the head in fp32 (see `vllm_engine`): in bf16 it is a large part of the mismatch.
        cast_lm_head_to_fp32=on_gpu,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        logging_steps=updates,
        save_steps=stage.checkpoint_every * updates,
        save_total_limit=2,
        seed=context.recipe.seed,
        report_to=context.recipe.report_to or "none",
        use_cpu=not on_gpu,
        bf16=on_gpu and context.recipe.precision != "fp32",
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
    )
    reward = VerifiedReward(context)
    clock = {"last": time.perf_counter()}

    def make_row(logs: dict) -> dict:
        now = time.perf_counter()
        step_s, clock["last"] = now - clock["last"], now
        values = dict(trainer.step_values)
        generated = values.pop("rollout_tokens", 0)
        tokens = values.pop("batch_tokens", 0)
        learner_s = max(step_s - values.get("sync_s", 0.0) - values.get("rollout_s", 0.0), 1e-9)
        return {
            "reward": logs.get("reward"),
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "entropy": logs.get("entropy"),
            "kl": logs.get("kl"),
            "completion_length": logs.get("completions/mean_length"),
            "truncated_share": logs.get("completions/clipped_ratio"),
            "zero_std_share": logs.get("frac_reward_zero_std"),
            "clip_share": logs.get("clip_ratio/region_mean"),
            "is_ratio_mean": logs.get("sampling/importance_sampling_ratio/mean"),
            "step_s": step_s,
            "learner_s": learner_s,
            "tokens_per_s": generated / step_s if step_s > 0 else None,
            "learner_tokens_per_s": tokens / learner_s,
            "workers_restarted": context.pool.restarts,
            **values,
        }

    trainer = RLVRLearner(
        context=context,
        args=args,
        reward=reward,
        model=context.model,
        train_dataset=context.problems.train,
        processing_class=context.tokenizer,
        callbacks=[RecordCallback(context, make_row, updates)],
    )
    clock["last"] = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
