"""The RLVR stage: builds the rollout queue and the learner, and trains."""

from __future__ import annotations

import copy
import json
import threading
import time

from kimi_rl.dataset import load_problems
from kimi_rl.dataset.prompt_order import PromptSampler
from kimi_rl.errors import InputError
from kimi_rl.learner.ptx import PTXStream
from kimi_rl.learner.rlvr import RLVRLearner
from kimi_rl.learner.stage import ROLLOUT_STATE, RecordCallback, StageContext
from kimi_rl.learner.trl_trainers import GRPOConfig
from kimi_rl.learner.warm_up import warm_up
from kimi_rl.recipe import RLVRStage
from kimi_rl.rollout.batches import BatchMaker, RolloutQueue
from kimi_rl.tokenizer import prompt_ids


def run_rlvr(context: StageContext) -> None:
    """Train, writing metrics, rollouts and checkpoints. On return the context's model holds the final weights."""
    stage: RLVRStage = context.stage
    checkpoint = context.prepare_resume()
    if checkpoint is None and stage.eval is not None:
        context.evaluate(0, 0, "before")
    if stage.overlapped:
        context.pool.run_in_background()
    queue = RolloutQueue(make_batch_maker(context), stage)
    trainer = RLVRLearner(
        context=context,
        queue=queue,
        ptx=ptx_stream(context),
        args=trl_arguments(context),
        model=context.model,
        train_dataset=context.problems.train,
        processing_class=context.tokenizer,
    )
    warm_up(trainer, lambda text: context.record("note", 0, text=text))
    clock = StepClock(context, trainer)
    trainer.add_callback(RecordCallback(context, clock.row, trainer.end_step, trainer.rollout_state))
    if checkpoint is not None:
        trainer.load_rollout_state(read_rollout_state(checkpoint))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        queue.close()


def make_batch_maker(context: StageContext) -> BatchMaker:
    """The maker has a tokenizer of its own: batches are made in threads beside the learner's."""
    stage: RLVRStage = context.stage
    rows = context.problems.train
    sampler = PromptSampler(
        len(rows),
        seed=context.recipe.seed,
        order=stage.prompt_order,
        curriculum_steps=stage.curriculum_steps or max(1, stage.steps // 2),
        # A long worked solution is the best sign of a hard problem that every data set has.
        prior=[-len(solution) for solution in rows["solution"]] if stage.prompt_order == "curriculum" else None,
    )
    tokenizer, lock = copy.deepcopy(context.tokenizer), threading.Lock()

    def tokenize(row: dict) -> list[int]:
        with lock:
            return prompt_ids(tokenizer, row["prompt"])

    def decode(token_ids) -> str:
        with lock:
            return tokenizer.decode(token_ids, skip_special_tokens=True)

    return BatchMaker(
        context.pool,
        sampler,
        rows,
        stage,
        seed=context.recipe.seed,
        tokenize=tokenize,
        decode=decode,
        verify=context.verify,
    )


def ptx_stream(context: StageContext) -> PTXStream | None:
    """The worked solutions of the supervised term, if the stage has one."""
    ptx = context.stage.ptx
    if ptx is None:
        return None
    rows = (load_problems(ptx.data) if ptx.data is not None else context.problems).train
    where = f"stages.{context.stage.name}.ptx"
    stream = PTXStream(
        context.tokenizer,
        rows["prompt"],
        rows["solution"],
        batch_size=ptx.batch_size,
        max_length=ptx.max_length,
        seed=context.recipe.seed,
        where=where,
    )
    text = f"PTX samples: {len(stream)} used, {stream.dropped} longer than {ptx.max_length} tokens"
    context.record("note", 0, text=text)
    return stream


def read_rollout_state(checkpoint) -> dict:
    file = checkpoint / ROLLOUT_STATE
    if not file.is_file():
        raise InputError(f"{checkpoint}: no {ROLLOUT_STATE} in this checkpoint; it was written by another version")
    return json.loads(file.read_text())


def trl_arguments(context: StageContext) -> GRPOConfig:
    """One step of TRL's trainer is one rollout batch, so schedule, warm-up and checkpoints count batches."""
    stage: RLVRStage = context.stage
    micro = stage.micro_batch
    return GRPOConfig(
        **context.trainer_arguments(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=stage.completions_per_step // micro,
        steps_per_generation=stage.completions_per_step // micro,
        num_generations=stage.group_size,
        max_completion_length=stage.rollout.max_tokens,
        temperature=stage.rollout.temperature,
        loss_type="grpo" if stage.loss_type == "k15" else stage.loss_type,  # k15: RLVRLearner._k15_loss
        scale_rewards=stage.scale_rewards,
        epsilon=stage.epsilon,
        epsilon_high=stage.epsilon_high,
        beta=0.0,  # set by RLVRLearner, with a reference model of our own class
        mask_truncated_completions=stage.mask_truncated,
        vllm_importance_sampling_mode=stage.importance_sampling.mode,
        vllm_importance_sampling_clip_max=stage.importance_sampling.cap,
        # Both sides run the head in fp32 (see `vllm_engine`): in bf16 it is a large part of the mismatch.
        cast_lm_head_to_fp32=context.on_gpu,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,  # it would read every micro-batch's loss, and so wait for its whole backward
    )


class StepClock:
    """Turns what the trainer logs after a step into the step's row of metrics."""

    def __init__(self, context: StageContext, trainer: RLVRLearner):
        self._context, self._trainer = context, trainer
        self._last = time.perf_counter()

    def row(self, logs: dict) -> dict:
        now = time.perf_counter()
        step_s, self._last = now - self._last, now
        values = dict(self._trainer.step_values)
        generated = values.pop("rollout_tokens", 0)
        tokens = values.pop("batch_tokens", 0)
        learner_s = max(step_s - values.get("sync_s", 0.0) - values.get("wait_s", 0.0), 1e-9)
        return {
            "reward": logs.get("reward"),
            "loss": logs["loss"] / values.get("updates", 1),
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "entropy": logs.get("entropy"),
            "ptx_loss": logs.get("ptx_loss"),
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
            "workers_restarted": self._context.pool.restarts,
            **values,
        }
