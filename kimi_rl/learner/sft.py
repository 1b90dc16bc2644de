"""The SFT stage: trl.SFTTrainer on the worked solutions, loss on the answer only, nothing packed."""

from __future__ import annotations

import time

from datasets import Dataset
from trl.chat_template_utils import has_generation_markers

from kimi_rl.errors import InputError
from kimi_rl.learner.stage import CheckpointNames, RecordCallback, StageContext
from kimi_rl.learner.trl_trainers import SFTConfig, SFTTrainer
from kimi_rl.recipe import SFTStage


class SFTLearner(CheckpointNames, SFTTrainer):
    """`trl.SFTTrainer` whose checkpoints are read under the hub's tensor names; for Kimi Linear models."""


def sft_dataset(context: StageContext) -> Dataset:
    """Questions as prompts and worked solutions as completions; those above `max_length` tokens are dropped, with a
    count.

    The answer is what the chat template adds to the prompt, so that templates without `{% generation %}` marks will do;
    those with marks narrow it down.
    """
    stage: SFTStage = context.stage
    tokenizer = context.tokenizer
    rows, dropped = [], 0
    for prompt, solution in zip(
        context.problems.train["prompt"], context.problems.train["solution"], strict=True
    ):
        answer = [{"role": "assistant", "content": solution}]
        if len(rows) >= stage.steps * stage.batch_size:
            break  # more than the stage will read
        if len(tokenizer.apply_chat_template([*prompt, *answer], tokenize=True, return_dict=False)) > stage.max_length:
            dropped += 1
            continue
        rows.append({"prompt": prompt, "completion": answer})
    if not rows:
        raise InputError(
            f"stages.{stage.name}.max_length: all {dropped} training samples are longer than {stage.max_length} "
            "tokens; raise max_length or choose shorter problems"
        )
    context.record("note", 0, text=f"SFT samples: {len(rows)} used, {dropped} longer than {stage.max_length} tokens")
    return Dataset.from_list(rows)


def run_sft(context: StageContext) -> None:
    """Train, writing metrics and checkpoints. On return the context's model holds the final weights."""
    stage: SFTStage = context.stage
    micro = stage.micro_batch_size or stage.batch_size
    checkpoint = context.prepare_resume()
    if checkpoint is None and stage.eval is not None:
        context.evaluate(0, 0, "before")
    args = SFTConfig(
        **context.trainer_arguments(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=stage.batch_size // micro,
        max_length=None,
        # Packed or padding-free batches would let the recurrent state of one sample reach the next.
        packing=False,
        padding_free=False,
        completion_only_loss=True,
        # Where the template marks what the model says, that alone: ChatML adds a newline that nobody ever samples.
        assistant_only_loss=has_generation_markers(context.tokenizer.chat_template),
        data_seed=context.recipe.seed,
    )
    clock = {"last": time.perf_counter(), "tokens": 0.0}

    def make_row(logs: dict) -> dict:
        now = time.perf_counter()
        seconds, clock["last"] = now - clock["last"], now
        tokens, clock["tokens"] = logs.get("num_tokens", 0.0) - clock["tokens"], logs.get("num_tokens", 0.0)
        return {
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "entropy": logs.get("entropy"),
            "mean_token_accuracy": logs.get("mean_token_accuracy"),
            "tokens_per_s": tokens / seconds if seconds > 0 else None,
            "step_s": seconds,
        }

    trainer = (SFTTrainer if context.plain else SFTLearner)(
        model=context.model,
        args=args,
        train_dataset=sft_dataset(context),
        processing_class=context.tokenizer,
        callbacks=[RecordCallback(context, make_row)],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
