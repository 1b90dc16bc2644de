"""The distill stage: a converted model learns from its source, layer by layer or by the distributions over tokens.

Texts lie end to end in packed rows. `match: layers` runs the teacher once a row; each of the student's token mixers
reads what the teacher's layer reads, and is to give what its attention gives. `match: logits` runs both models and
compares their distributions at every token.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from kimi_rl.dataset import load_problems
from kimi_rl.errors import InputError
from kimi_rl.learner.data_parallel import Launch, TrainingGroup, training_group
from kimi_rl.learner.distill_exam import Exam
from kimi_rl.learner.distill_trainers import DistillTrainer, make_trainer
from kimi_rl.learner.stage import RecordCallback, StageContext, is_due
from kimi_rl.learner.teacher import Teacher, check_pair
from kimi_rl.learner.texts import Texts, check_texts, held_out_texts, training_texts
from kimi_rl.model.source import load_source_tokenizer
from kimi_rl.recipe import DistillStage


def run_distill(context: StageContext, launch: Launch | None = None) -> dict[str, Any]:
    """Train, writing metrics and checkpoints. On return the context's model holds the final weights.

    `launch` starts those that train beside this process, where the stage has several learners.

    Returns the held-out figures after the last step: `student_perplexity`, `teacher_perplexity`, with `match: layers`
    the errors of the layers, and accuracies where the stage has an `eval`.
    """
    checkpoint = context.prepare_resume()
    with training_group(context.job.place, context.job.device, launch, checkpoint) as group:
        return distill_in(group, context, checkpoint)


def distill_in(group: TrainingGroup, context: StageContext, checkpoint: Path | None) -> dict[str, Any]:
    """`run_distill` as one of a group. Those that follow measure nothing, and return nothing."""
    stage: DistillStage = context.stage
    leads = context.job.place.leads
    texts, held_out = load_texts(context)
    teacher = load_teacher(context, texts)
    trainer = make_trainer(context, teacher, texts, group)
    exam = Exam(context, teacher, held_out, trainer.accelerator.autocast)
    trainer.add_callback(DistillCallback(context, trainer, exam))
    if context.on_gpu:
        text = "the first texts compile GPU kernels: up to two minutes the first time"
        context.record("note", 0, text=text)
    accuracy = stage.eval is not None
    if checkpoint is None and leads:
        exam.hold(0, "before", accuracy=accuracy)
    group.join()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return exam.hold(stage.steps, "after", accuracy=accuracy) if leads else {}


def load_texts(context: StageContext) -> tuple[Texts, Texts]:
    """Texts to train on, and held-out ones."""
    stage: DistillStage = context.stage
    problems = [context.problems, *map(load_problems, stage.more_data)]
    file = check_texts(stage.texts, f"stages.{stage.name}.texts") if stage.texts is not None else []
    texts = training_texts(context.tokenizer, problems, file, stage.max_length)
    held_out = held_out_texts(context.tokenizer, problems, stage.max_length)
    vocabulary = context.model.config.vocab_size
    for found in (texts, held_out):
        largest = max((max(ids) for ids in found.ids), default=None)
        if largest is None:
            raise InputError(f"stages.{stage.name}: no text of at least 2 tokens to read")
        if largest >= vocabulary:
            raise InputError(f"stages.{stage.name}.texts: token id {largest} is outside the vocabulary of {vocabulary}")
    text = (
        f"distilling on {len(texts.ids)} texts of {sum(texts.lengths):,} tokens, {texts.cut} of them cut at "
        f"{stage.max_length}; held out: {len(held_out.ids)} of {sum(held_out.lengths):,}"
    )
    context.record("note", 0, text=text)
    return texts, held_out


def load_teacher(context: StageContext, texts: Texts) -> Teacher:
    """The teacher beside the student. Raises InputError where its shape, vocabulary or tokenizer is another."""
    stage: DistillStage = context.stage
    where = f"stages.{stage.name}.teacher"
    sample = context.tokenizer.decode(texts.ids[0])
    ours, theirs = (t(sample)["input_ids"] for t in (context.tokenizer, load_source_tokenizer(stage.teacher, where)))
    if ours != theirs:
        raise InputError(
            f"{where}: {stage.teacher} reads the first text as {len(theirs)} tokens other than the student's "
            f"{len(ours)}; student and teacher need one tokenizer"
        )
    dtype = torch.bfloat16 if context.on_gpu and context.recipe.precision != "fp32" else torch.float32
    teacher = Teacher(stage.teacher, where, dtype=dtype, device=context.job.device)
    check_pair(teacher.model.config, context.model.config, where)
    return teacher


class DistillCallback(RecordCallback):
    """Holds the exam on schedule, and has the last step logged whatever `log_every` is."""

    def __init__(self, context: StageContext, trainer: DistillTrainer, exam: Exam):
        super().__init__(context, trainer.make_row)
        self._trainer, self._exam = trainer, exam

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.start_clock()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True
        section = self._context.stage.eval
        accuracy = section is not None and is_due(section.every, state)
        due = accuracy or is_due(self._context.stage.perplexity_every, state)
        if due and self._context.job.place.leads:
            start = time.perf_counter()
            self._exam.hold(state.global_step, "during", accuracy=accuracy)
            self._trainer.paused_s += time.perf_counter() - start
