"""What every stage shares: its model, tokenizer, problems, rollout pool, verifier, checkpoints and records."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from kimi_rl.chat_marks import mark_chat_template
from kimi_rl.dataset import load_problems
from kimi_rl.errors import InputError
from kimi_rl.evaluate import Evaluation, evaluate
from kimi_rl.learner.data_parallel import Place
from kimi_rl.model.load_save import load_model, load_tokenizer, save_model
from kimi_rl.model.naming import load_into, to_checkpoint
from kimi_rl.model.source import is_source, load_source, load_source_tokenizer
from kimi_rl.recipe import DistillStage, Recipe, RLVRStage, SFTStage
from kimi_rl.rewards import VerifierPool
from kimi_rl.rollout.pool import RolloutPool, pool_settings
from kimi_rl.rollout.replicas import one_worker, probe_in_ray, settle_workers
from kimi_rl.run_dir import RunDir, usable_cores
from kimi_rl.seeds import derive_seed
from kimi_rl.tokenizer import prompt_ids

log = logging.getLogger(__name__)

COMPLETE_MARK = "complete.json"
ROLLOUT_STATE = "rollout_state.json"  # beside a checkpoint of an RLVR stage


@dataclass(frozen=True)
class StageJob:
    """One stage to run: which one, where, and from which model folder. `device` is "cpu" or "cuda".

    `place`: this process's among those that train the stage together.
    """

    recipe: Recipe
    index: int
    run_dir: str
    start_model: str
    device: str
    threads: int
    resume: bool
    place: Place = Place()


class StageContext:
    """Everything a stage needs around its trainer. Lives in the learner actor; closes its workers when done."""

    def __init__(self, job: StageJob):
        self.job = job
        self.recipe = job.recipe
        self.stage: SFTStage | DistillStage | RLVRStage = job.recipe.stages[job.index]
        self.run_dir = RunDir(Path(job.run_dir))
        self.folder = self.run_dir.stage_dir(job.index, self.stage.name)
        self.plain = is_source(job.start_model)  # the source of a conversion itself, which an sft stage may tune
        if self.plain:
            self.model, self.tokenizer = load_trainable_source(job.start_model, job.device)
        else:
            self.model = load_model(job.start_model, dtype=torch.float32, device=job.device)
            self.tokenizer = load_tokenizer(job.start_model)
        self.problems = load_problems(self.stage.data or self.recipe.data)
        self.held_out_ids = [self.prompt_ids(row) for row in self.problems.held_out["prompt"]]
        self.held_out_golds = list(self.problems.held_out["answer"])
        self.verifier: VerifierPool | None = None
        self.pool: RolloutPool | None = None
        if self.stage.kind == "rlvr" or self.stage.eval is not None:  # others generate nothing
            self._start_workers()

    def _start_workers(self) -> None:
        job, reward = self.job, self.recipe.reward
        self.verifier = VerifierPool(workers=reward.workers, deadline_s=reward.deadline_s)
        settings = dict(
            model_folder=job.start_model,
            max_model_len=self.longest_prompt() + self.longest_completion(),
            seed=self.recipe.seed,
            threads=job.threads,
            device=job.device,
        )
        rollout = settle_workers(
            self.stage.rollout,
            self.folder / "rollout_workers.json",
            device=job.device,
            cores=usable_cores(),
            probe=lambda: probe_in_ray(pool_settings(one_worker(self.stage.rollout), **settings)),
        )
        self.pool = RolloutPool(**pool_settings(rollout, **settings))

    @property
    def on_gpu(self) -> bool:
        return self.job.device != "cpu"

    def longest_prompt(self) -> int:
        rows = self.problems.train["prompt"]
        sample = rows if len(rows) <= 2000 else rows[:2000]
        return 16 + max(max(map(len, self.held_out_ids)), max(len(self.prompt_ids(p)) for p in sample))

    def longest_completion(self) -> int:
        evaluation = self.stage.eval
        return max(self.stage.rollout.max_tokens, (evaluation.max_tokens or 0) if evaluation else 0)

    def prompt_ids(self, messages: Sequence[dict]) -> list[int]:
        return prompt_ids(self.tokenizer, messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def verify(self, pairs: Sequence[tuple[str, str]]):
        reward = self.recipe.reward
        kind = self.problems.answer_kind if reward.kind == "auto" else reward.kind
        return self.verifier.verify_many(list(pairs), kind=kind, extract=tuple(reward.extract))

    # --- weights and evaluation -------------------------------------------------------------------------------

    def sync(self, version: int) -> float:
        """Bring the workers to `version` (the number of steps trained); returns the seconds that the caller waited."""
        if self.pool.version == version:
            return 0.0
        start = time.perf_counter()
        update = self.pool.publish if self.pool.in_background else self.pool.update_weights
        update(to_checkpoint(self.model), version)
        return time.perf_counter() - start

    def evaluate(self, step: int, version: int, when: str, **more: Any) -> Evaluation:
        """Evaluate the current weights on the held-out problems, and record the figures, and `more` in the same row."""
        start = time.perf_counter()
        self.sync(version)
        figures, records = evaluate(
            self.pool.generate,
            self.verify,
            self.held_out_ids,
            self.held_out_golds,
            self.decode,
            self.stage.eval,
            max_tokens=self.stage.rollout.max_tokens,
            seed=derive_seed(self.recipe.seed, "held-out"),
        )
        for record, question in zip(records, self.problems.held_out["question"], strict=False):
            record["question"] = question
        self.run_dir.write_rollouts(f"{self.stage.name}_eval_{when}", step, records)
        self.record("eval", step, when=when, eval_s=time.perf_counter() - start, **figures.row(), **more)
        return figures

    def record(self, type_: str, step: int, **values: Any) -> None:
        """Append one row to metrics.jsonl, less values that are not finite. Who follows another records nothing."""
        if not self.job.place.leads:
            return
        clean = {k: v for k, v in values.items() if not (isinstance(v, float) and not math.isfinite(v))}
        self.run_dir.append_metrics(
            {
                "type": type_,
                "stage": self.stage.name,
                "kind": self.stage.kind,
                "step": step,
                "steps_total": self.stage.steps,
                "time": time.time(),
                **clean,
            }
        )

    def trainer_arguments(self) -> dict[str, Any]:
        """What every stage's trl trainer is told in the same way."""
        stage, on_gpu, leads = self.stage, self.on_gpu, self.job.place.leads
        return dict(
            output_dir=str(self.folder / "checkpoints"),
            max_steps=stage.steps,
            learning_rate=stage.learning_rate,
            lr_scheduler_type=stage.schedule,
            warmup_steps=stage.warmup_steps,
            weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="steps" if leads else "no",
            save_steps=stage.checkpoint_every,
            save_total_limit=2,
            seed=self.recipe.seed,
            report_to=(self.recipe.report_to or "none") if leads else "none",
            use_cpu=not on_gpu,
            bf16=on_gpu and self.recipe.precision != "fp32",
            dataloader_pin_memory=on_gpu,
            disable_tqdm=True,
        )

    # --- checkpoints ------------------------------------------------------------------------------------------

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written whole."""
        found = [p.parent for p in self.folder.glob(f"checkpoints/checkpoint-*/{COMPLETE_MARK}")]
        return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)

    def prepare_resume(self) -> Path | None:
        """Where to go on from. Drops what was recorded after that point, so that every step appears once.

        Who follows another process is told by it.
        """
        if not self.job.place.leads:
            return Path(self.job.place.checkpoint) if self.job.place.checkpoint else None
        checkpoint = self.last_checkpoint() if self.job.resume else None
        step = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else -1
        self.run_dir.truncate_metrics(self.stage.name, step)
        self.run_dir.truncate_rollouts(self.stage.name, step)
        for folder in self.folder.glob("checkpoints/checkpoint-*"):
            if not (folder / COMPLETE_MARK).exists():
                shutil.rmtree(folder)
        return checkpoint

    def save_final(self) -> Path:
        target = self.folder / "model"
        if self.plain:
            self.model.save_pretrained(target)
            self.tokenizer.save_pretrained(target)
        else:
            save_model(self.model, self.tokenizer, target)
        return target

    def close(self) -> None:
        for workers in (self.pool, self.verifier):
            if workers is not None:
                workers.close()


class RecordCallback(TrainerCallback):
    """Writes metrics, marks whole checkpoints, and evaluates on schedule.

    `make_row` turns what the trainer logs into a row of metrics; `end_step` runs after the last optimizer step of a
    step; `state` gives what a checkpoint must hold beside what the trainer saves.
    """

    def __init__(
        self,
        context: StageContext,
        make_row: Callable[[dict], dict],
        end_step: Callable[[], None] | None = None,
        state: Callable[[], dict] | None = None,
    ):
        self._context = context
        self._make_row, self._end_step, self._state = make_row, end_step, state

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:  # the closing summary of a training has no per-step loss
            self._context.record("train", state.global_step, **self._make_row(logs))

    def on_step_end(self, args, state, control, **kwargs):
        if self._end_step is not None:
            self._end_step()
        section = self._context.stage.eval
        if section is not None and is_due(section.every, state):
            self._context.evaluate(state.global_step, state.global_step, "during")

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._state is not None:
            (folder / ROLLOUT_STATE).write_text(json.dumps(self._state()))
        (folder / COMPLETE_MARK).write_text(json.dumps({"policy_version": state.global_step}))


def load_trainable_source(path: str, device: str) -> tuple[Any, Any]:
    """A plain transformer in float32 and its tokenizer, whose chat template marks what is learned, as a conversion's
    does: so that both are tuned on the same tokens."""
    model = load_source(path, "model.path", dtype=torch.float32, device=device).requires_grad_(True)
    tokenizer = load_source_tokenizer(path, "model.path")
    mark_chat_template(tokenizer)
    return model, tokenizer


def is_due(every: int, state: Any) -> bool:
    """Whether something that comes every so many steps (0: never) comes after this one, which is not the last."""
    return bool(every) and state.global_step % every == 0 and state.global_step < state.max_steps


class CheckpointNames:
    """Trainer mixin: checkpoints are written and read under the hub's tensor names, through our own name mapping.

    transformers' own writer renames the feed-forward layers of dense Kimi Linear models to names that the published
    checkpoints do not have, and its reader matches raw module names without being strict: it would leave renamed
    tensors untouched, silently.
    """

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in to_checkpoint(model)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        file = Path(resume_from_checkpoint) / "model.safetensors"
        if not file.is_file():
            raise InputError(f"{resume_from_checkpoint}: no model.safetensors in this checkpoint")
        target = self.accelerator.unwrap_model(model if model is not None else self.model)
        load_into(target, sorted(load_file(file).items()))  # sorted: a layer's tensors are adjacent
