"""How a distill stage trains: transformers' Trainer over packed rows, with a loss on layers or one on logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from kimi_rl.kernels.distill_loss import distill_loss
from kimi_rl.kernels.relative_error import relative_error
from kimi_rl.kernels.segments import Segments
from kimi_rl.learner.data_parallel import TrainingGroup
from kimi_rl.learner.optimizers import muon_with_adamw
from kimi_rl.learner.packing import Pack, packed_states
from kimi_rl.learner.stage import CheckpointNames, StageContext
from kimi_rl.learner.teacher import Teacher
from kimi_rl.learner.texts import Texts, shuffled_rows
from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.recipe import DistillStage


class Rows(Dataset):
    """The packed rows of a whole stage, each made when it is asked for."""

    def __init__(self, texts: Texts, rows: Sequence[Sequence[int]], device: torch.device | str):
        self._texts, self._rows, self._device = texts, rows, device

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Pack]:
        return {"pack": self._texts.pack(self._rows[number], self._device)}


def make_trainer(context: StageContext, teacher: Teacher, texts: Texts, group: TrainingGroup) -> DistillTrainer:
    """`group`: the processes among which a step's rows are divided."""
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
        "gradient_accumulation_steps": stage.rows_per_step // group.size,
    }
    kind = {"layers": LayerTrainer, "logits": LogitTrainer}[stage.match]
    return kind(
        stage=stage,
        teacher=teacher,
        group=group,
        model=context.model,
        args=TrainingArguments(**arguments),
        train_dataset=Rows(texts, rows[group.rank :: group.size], context.job.device),
        data_collator=lambda batch: batch[0],
        processing_class=context.tokenizer,
    )


class DistillTrainer(CheckpointNames, Trainer):
    """What both ways of distilling share: rows in their order, the optimizer, and the figures of a row of metrics."""

    def __init__(self, *, stage: DistillStage, teacher: Teacher, group: TrainingGroup, **arguments: Any):
        super().__init__(**arguments)
        self.stage, self.teacher, self.group = stage, teacher, group
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

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = self.learn_row(model, inputs)
        if self.accelerator.sync_gradients:  # the last row of a step
            self.group.average([p.grad for p in self.model.parameters() if p.grad is not None])
        return loss

    def learn_row(self, model: torch.nn.Module, inputs: dict[str, Pack]) -> torch.Tensor:
        """Forward and backward of a row; returns its part of the step's loss."""
        return super().training_step(model, inputs)

    def note_row(self, pack: Pack, figures: torch.Tensor) -> None:
        self._figures.append(figures)
        self._tokens += pack.segments.length

    def name_figures(self, figures: torch.Tensor) -> dict[str, Any]:
        """Columns of metrics from the mean of what `note_row` got, on the CPU."""
        raise NotImplementedError

    def make_row(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What the trainer logs, as a row of metrics: means over the steps since the last row."""
        means = torch.stack(self._figures).mean(0).double()
        counts = means.new_tensor([logs["loss"], self._tokens])
        self.group.average([means, counts])
        figures, (loss, tokens) = self.name_figures(means.cpu()), counts.tolist()
        now, steps = time.perf_counter(), max(self.state.global_step - self._last_step, 1)
        seconds = now - self._last_time - self.paused_s
        row = {
            "loss": loss,
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "tokens_per_s": tokens * self.group.size / seconds if seconds > 0 else None,
            "step_s": seconds / steps,
            **figures,
        }
        self._figures, self._tokens = [], 0
        self.start_clock()
        return row


class LayerTrainer(DistillTrainer):
    """`match: layers`. The loss is the mean of the layers' relative errors."""

    def learn_row(self, model: torch.nn.Module, inputs: dict[str, Pack]) -> torch.Tensor:
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
            states = packed_states(model, pack)
        # Not `states[places]`: that one's backward sorts the places, and twice waits for the card to look at them.
        states = states.index_select(0, pack.scored_places)
        teacher_states = self.teacher.run(pack).index_select(0, pack.scored_places)
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
