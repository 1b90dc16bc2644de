"""The distill stage: a converted model learns from its source, layer by layer or by the distributions over tokens.

Texts lie end to end in packed rows. `match: layers` runs the teacher once a row; each of the student's token mixers
reads what the teacher's layer reads, and is to give what its attention gives. `match: logits` runs both models and
compares their distributions at every token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from kimi_rl.dataset import load_problems
from kimi_rl.errors import InputError
from kimi_rl.kernels.distill_loss import distill_loss
from kimi_rl.kernels.logprob import token_logprobs
from kimi_rl.kernels.segments import Segments
from kimi_rl.learner.optimizers import muon_with_adamw
from kimi_rl.learner.packing import Pack
from kimi_rl.learner.stage import CheckpointNames, RecordCallback, StageContext, is_due
from kimi_rl.learner.teacher import Teacher, check_pair
from kimi_rl.learner.texts import (
    Texts,
    check_texts,
    held_out_texts,
    rows_in_order,
    shuffled_rows,
    training_texts,
)
from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.model.source import load_source_tokenizer
from kimi_rl.objective import relative_error
from kimi_rl.recipe import DistillStage


def run_distill(context: StageContext) -> dict[str, Any]:
    """Train, writing metrics and checkpoints. On return the context's model holds the final weights.

    Returns the held-out figures after the last step: `student_perplexity`, `teacher_perplexity`, with `match: layers`
    the errors of the layers, and accuracies where the stage has an `eval`.
    """
    stage: DistillStage = context.stage
    checkpoint = context.prepare_resume()
    texts, held_out = load_texts(context)
    teacher = load_teacher(context, texts)
    trainer = make_trainer(context, teacher, texts)
    exam = Exam(context, teacher, held_out, trainer.accelerator.autocast)
    trainer.add_callback(DistillCallback(context, trainer, exam))
    if context.on_gpu:
        text = "the first texts compile GPU kernels: up to two minutes the first time"
        context.record("note", 0, text=text)
    accuracy = stage.eval is not None
    if checkpoint is None:
        exam.hold(0, "before", accuracy=accuracy)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return exam.hold(stage.steps, "after", accuracy=accuracy)


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


# --- training ---------------------------------------------------------------------------------------------------


class Rows(Dataset):
    """The packed rows of a whole stage, each made when it is asked for."""

    def __init__(self, texts: Texts, rows: Sequence[Sequence[int]], device: torch.device | str):
        self._texts, self._rows, self._device = texts, rows, device

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Pack]:
        return {"pack": self._texts.pack(self._rows[number], self._device)}


def make_trainer(context: StageContext, teacher: Teacher, texts: Texts) -> DistillTrainer:
    stage: DistillStage = context.stage
    rows = shuffled_rows(
        texts.lengths, stage.pack_tokens, stage.steps * stage.rows_per_step, context.recipe.seed
    )
    if not stage.train_all:
        context.model.requires_grad_(False)
        for layer in context.model.model.layers:
            layer.self_attn.requires_grad_(True)
    arguments = context.trainer_arguments() | {
        "logging_steps": stage.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would read every loss from the device
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "per_device_train_batch_size": 1,  # a row
        "gradient_accumulation_steps": stage.rows_per_step,
    }
    kind = {"layers": LayerTrainer, "logits": LogitTrainer}[stage.match]
    return kind(
        stage=stage,
        teacher=teacher,
        model=context.model,
        args=TrainingArguments(**arguments),
        train_dataset=Rows(texts, rows, context.job.device),
        data_collator=lambda batch: batch[0],
        processing_class=context.tokenizer,
    )


class DistillTrainer(CheckpointNames, Trainer):
    """What both ways of distilling share: rows in their order, the optimizer, and the figures of a row of metrics."""

    def __init__(self, *, stage: DistillStage, teacher: Teacher, **arguments: Any):
        super().__init__(**arguments)
        self.stage, self.teacher = stage, teacher
        self.model_accepts_loss_kwargs = False  # the losses are means over a row, to be averaged over a step's rows
        self._figures: list[torch.Tensor] = []  # of the rows since the last log, left on the device until then
        self._tokens = 0
        self.paused_s = 0.0  # since the last log

    def start_clock(self) -> None:
        self._last_time, self._last_step, self.paused_s = time.perf_counter(), self.state.global_step, 0.0

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers' estimate knows only `input_ids`

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.stage.optimizer == "adamw" or self.optimizer is not None:
            return super().create_optimizer()
        self.optimizer = muon_with_adamw(self.model, lr=self.stage.learning_rate, weight_decay=self.stage.weight_decay)
        return self.optimizer

    def note_row(self, pack: Pack, figures: torch.Tensor) -> None:
        self._figures.append(figures)
        self._tokens += pack.segments.length

    def name_figures(self, figures: torch.Tensor) -> dict[str, Any]:
        """Columns of metrics from the mean of what `note_row` got, on the CPU."""
        raise NotImplementedError

    def make_row(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What the trainer logs, as a row of metrics: means over the steps since the last row."""
        figures = self.name_figures(torch.stack(self._figures).mean(0).cpu())
        now, steps = time.perf_counter(), max(self.state.global_step - self._last_step, 1)
        seconds = now - self._last_time - self.paused_s
        row = {
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "tokens_per_s": self._tokens / seconds if seconds > 0 else None,
            "step_s": seconds / steps,
            **figures,
        }
        self._figures, self._tokens = [], 0
        self.start_clock()
        return row


class LayerTrainer(DistillTrainer):
    """`match: layers`. The loss is the mean of the layers' relative errors."""

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One backward a layer, as the teacher comes by it: no more than one layer's activations exist at a time."""
        model.train()
        pack: Pack = inputs["pack"]
        errors: list[torch.Tensor] = []
        share = len(model.model.layers) * self.current_gradient_accumulation_steps

        def learn(error: torch.Tensor) -> None:
            self.accelerator.backward(error / share)
            errors.append(error.detach())

        match_layers(model, self.teacher, pack, self.accelerator.autocast, learn)
        self.note_row(pack, torch.stack(errors))
        return torch.stack(errors).sum() / share

    def name_figures(self, figures: torch.Tensor) -> dict[str, Any]:
        return error_columns(figures.tolist())


class LogitTrainer(DistillTrainer):
    """`match: logits`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        pack: Pack = inputs["pack"]
        with self.accelerator.autocast():
            states = student_states(model, pack)[pack.scored_places]
        teacher_states = self.teacher.run(pack)[pack.scored_places]
        found = distill_loss(
            states,
            model.lm_head.weight,
            teacher_states,
            self.teacher.head,
            pack.scored_tokens,
            temperature=self.stage.temperature,
            kl_weight=self.stage.kl,
            ce_weight=self.stage.ce,
            matmul_dtype=torch.bfloat16 if self.args.bf16 else None,
        )
        self.note_row(pack, torch.stack([found.kl, found.ce]))
        return found.loss

    def name_figures(self, figures: torch.Tensor) -> dict[str, Any]:
        kl, ce = figures.tolist()
        return {"kl_to_teacher": kl, "cross_entropy": ce}


def student_states(model: KimiLinearForCausalLM, pack: Pack) -> torch.Tensor:
    """The last hidden states [T, D] of a packed row."""
    # A dictionary is taken as is; the layers keep the texts apart themselves.
    apart = {"full_attention": None, "linear_attention": None}
    out = model.model(
        input_ids=pack.input_ids,
        attention_mask=apart,
        position_ids=pack.positions,
        segments=pack.segments,
        use_cache=False,
    )
    return out.last_hidden_state[0]


def match_layers(
    model: KimiLinearForCausalLM,
    teacher: Teacher,
    pack: Pack,
    autocast: Callable[[], Any],
    take: Callable[[torch.Tensor], None],
) -> None:
    """Run the teacher over a row; `take` gets each layer's relative error in order, with its gradient if one is on."""
    record = torch.is_grad_enabled()

    def compare(index: int, states: torch.Tensor, wanted: torch.Tensor) -> None:
        with torch.set_grad_enabled(record):
            with autocast():
                found = mix(model.model.layers[index], states, pack.segments)
            take(relative_error(found, wanted))

    teacher.run(pack, compare)


def mix(layer: torch.nn.Module, states: torch.Tensor, segments: Segments) -> torch.Tensor:
    """What a layer of the student adds to `states` [1, T, D] before its feed-forward."""
    out = layer.self_attn(hidden_states=layer.input_layernorm(states), attention_mask=None, segments=segments)
    return out[0] if isinstance(out, tuple) else out


def error_columns(errors: Sequence[float]) -> dict[str, Any]:
    """Columns of metrics of the layers' relative errors, in order of the layers."""
    return {
        "layer_errors": list(errors),
        "layer_error_mean": sum(errors) / len(errors),
        "layer_error_max": max(errors),
    }


# --- measuring --------------------------------------------------------------------------------------------------


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
            states = student_states(model, pack)[pack.scored_places]
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
        if accuracy or is_due(self._context.stage.perplexity_every, state):
            start = time.perf_counter()
            self._exam.hold(state.global_step, "during", accuracy=accuracy)
            self._trainer.paused_s += time.perf_counter() - start
