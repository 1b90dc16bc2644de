"""Where a distill stage's step goes: each way of matching with each of its faster parts on and off, and its kernels.

    python benchmarks/distill_step.py --out benchmarks/results/distill_step_h100.json

A converted SmolLM2-135M's shape with random weights learns from a random source on texts of random tokens, through the
trainers that a stage runs: rows are laid out, gradients clipped, weights moved. Every arm trains a few steps that are
not timed and then `--steps` that are, without a wait of our own in between; ten arms take about 70 s after the imports,
those of one `--match` half of that. Of each arm

    step_s        seconds a step until the card is through
    host_s        seconds a step until the host is: near `step_s`, the host is what one waits for
    peak_bytes, device_allocations   of the timed steps; allocations from the driver are slow
    loss          mean of all steps but the first: arms compute the same

and, of the arms with everything on and off, one step under torch's profiler (`card_s`, `launches`, and the `kernels`
that took most), and how often and where the host waits for the card in another (`waits`). On a CPU the same without a
card's figures, for tests.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from result import hand_in

from kimi_rl.card_work import summarise
from kimi_rl.kernels.compile_cache import cache_environment, tuned_environment
from kimi_rl.run_dir import describe_environment, gpu_names

os.environ.update(cache_environment() | tuned_environment(gpu_names()))  # before Triton is imported

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback  # noqa: E402

from kimi_rl.convert.conversion import parse_ratio, target_config  # noqa: E402
from kimi_rl.learner.data_parallel import Place, TrainingGroup  # noqa: E402
from kimi_rl.learner.distill_trainers import make_trainer  # noqa: E402
from kimi_rl.learner.muon import BATCHED_MUON  # noqa: E402
from kimi_rl.learner.stage import StageContext  # noqa: E402
from kimi_rl.learner.teacher import Teacher  # noqa: E402
from kimi_rl.learner.texts import Texts  # noqa: E402
from kimi_rl.model.modeling import KimiLinearForCausalLM  # noqa: E402
from kimi_rl.recipe import DistillStage  # noqa: E402

TOP = 15  # kernels that are listed


def _plain(module: str):
    """PyTorch's operations in place of a kernel, where `module` chooses between them."""
    return lambda: patch(f"{module}.choose", lambda *args, **kwargs: "torch")


# What can be taken back to its plain form, and for which way of matching it says something.
PARTS = {
    "loss in one kernel": (("logits",), _plain("kimi_rl.kernels.distill_loss")),
    "relative error in one kernel": (("layers",), _plain("kimi_rl.kernels.relative_error")),
    "fused teacher": (("layers", "logits"), _plain("kimi_rl.learner.teacher")),
    "Muon in batches": (("layers", "logits"), lambda: patch.dict(os.environ, {BATCHED_MUON: "0"})),
}


def make_models(args: argparse.Namespace, folder: str) -> tuple[Teacher, KimiLinearForCausalLM]:
    """A source of SmolLM2's shape and what a conversion would make of it, both random."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.feed_forward,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.groups,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=1,
        eos_token_id=2,
    )
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    LlamaForCausalLM(shape).to(dtype).save_pretrained(folder)
    teacher = Teacher(folder, "teacher", dtype=dtype, device=args.device)
    tokens = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    ratio = parse_ratio(args.arch, None)
    student = KimiLinearForCausalLM(target_config(teacher.model.config, tokens, ratio, min(512, args.width)))
    return teacher, student.to(args.device)


def make_texts(args: argparse.Namespace, tokens: int) -> Texts:
    """Texts of random tokens, as long as problems with their solutions are."""
    draw = random.Random(0)
    texts = Texts(args.max_length)
    while sum(texts.lengths) < tokens:
        length = int(draw.lognormvariate(math.log(args.text_tokens), 0.6))
        texts.add([draw.randrange(args.vocabulary) for _ in range(min(max(length, 8), args.max_length))])
    return texts


class Watch(TrainerCallback):
    """Clocks a training's last steps, and runs one before them under a profiler if asked."""

    def __init__(self, args: argparse.Namespace, look: bool):
        self.warm, self.steps, self.look = args.warm, args.steps, look
        self.on_card = args.device == "cuda"
        self.found: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    @property
    def total(self) -> int:
        return self.warm + 2 + self.steps  # the same in every arm, for the same rows

    def _wait(self) -> None:
        if self.on_card:
            torch.cuda.synchronize()

    def _looked_at(self, step: int) -> str | None:
        """What is watched in this step (from 0) beside the clock."""
        place = step - self.warm
        return ("profile", "waits")[place] if self.look and self.on_card and 0 <= place < 2 else None

    def on_step_begin(self, args, state, control, **kwargs):
        looked_at = self._looked_at(state.global_step)
        if looked_at:
            self._wait()
        if looked_at == "profile":
            self._profile = self._stack.enter_context(profile(activities=[ProfilerActivity.CUDA]))
        elif looked_at == "waits":
            self._seen = self._stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self._stack.callback(torch.cuda.set_sync_debug_mode, "default")
        elif state.global_step == self.total - self.steps:
            self._wait()
            if self.on_card:
                torch.cuda.reset_peak_memory_stats()
                self._allocations = torch.cuda.memory_stats()["num_device_alloc"]
            self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = False
        looked_at = self._looked_at(state.global_step - 1)
        if looked_at:
            self._wait()
            self._stack.close()
        if looked_at == "profile":
            self.found |= summarise(self._profile, TOP)
        elif looked_at == "waits":
            places = [f"{Path(w.filename).name}:{w.lineno}" for w in self._seen if "synchroniz" in str(w.message)]
            self.found["waits"] = dict(Counter(places).most_common())
        elif state.global_step == self.total:
            host = time.perf_counter() - self._start
            self._wait()
            self.found["step_s"] = (time.perf_counter() - self._start) / self.steps
            self.found["host_s"] = host / self.steps
            if self.on_card:
                self.found["peak_bytes"] = torch.cuda.max_memory_allocated()
                self.found["device_allocations"] = torch.cuda.memory_stats()["num_device_alloc"] - self._allocations

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.found["loss"] = float(logs["loss"])


def run(args, match: str, teacher: Teacher, student: KimiLinearForCausalLM, texts: Texts, look: bool) -> dict[str, Any]:
    """One arm."""
    watch = Watch(args, look)
    tokens = args.layers_tokens if match == "layers" else args.logits_tokens
    stage = DistillStage(
        kind="distill",
        teacher="unused",
        match=match,
        steps=watch.total,
        max_length=args.max_length,
        batch_tokens=tokens,
        pack_tokens=tokens,
        learning_rate=1e-5,
        schedule="constant",
        log_every=watch.total,
        checkpoint_every=watch.total,
    )
    student.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        context = SimpleNamespace(
            stage=stage,
            recipe=SimpleNamespace(seed=0, precision="auto", report_to=None),
            model=student,
            tokenizer=None,
            job=SimpleNamespace(device=args.device, place=Place()),
            on_gpu=args.device == "cuda",
            folder=Path(folder),
        )
        context.trainer_arguments = lambda: StageContext.trainer_arguments(context)
        trainer = make_trainer(context, teacher, texts, TrainingGroup(Place()))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        trainer.start_clock()
        trainer.train()
    student.zero_grad(set_to_none=True)
    return watch.found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="layers,logits", help="ways of matching, with commas between")
    parser.add_argument("--arch", default="hybrid", choices=("hybrid", "mla"))
    parser.add_argument("--layers-tokens", type=int, default=65536, help="of a step that matches layers")
    parser.add_argument("--logits-tokens", type=int, default=32768, help="of a step that matches logits")
    parser.add_argument("--text-tokens", type=int, default=245, help="median of a text's; its mean is a fifth more")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--all-on", action="store_true", help="leave out the arms with a part in its plain form")
    sizes = {"layers": 30, "width": 576, "heads": 9, "groups": 3, "feed-forward": 1536, "vocabulary": 49152}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = make_models(args, folder)
    weights = {name: value.cpu().clone() for name, value in student.state_dict().items()}
    texts = make_texts(args, 4 * max(args.layers_tokens, args.logits_tokens))
    found: dict[str, Any] = {
        "benchmark": "distill_step",
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "arch": args.arch,
        "sizes": {name: getattr(args, name.replace("-", "_")) for name in sizes},
        "parameters": sum(p.numel() for p in student.parameters()),
        "environment": describe_environment(),
    }
    for match in args.match.split(","):
        parts = {} if args.all_on else {name: off for name, (matches, off) in PARTS.items() if match in matches}
        arms = {"all on": ()} | {f"without {name}": (name,) for name in parts}
        if parts:
            arms["all off"] = tuple(parts)
        found[match] = {"tokens": args.layers_tokens if match == "layers" else args.logits_tokens, "arms": {}}
        for arm, without in arms.items():
            with contextlib.ExitStack() as stack:
                for name in without:
                    stack.enter_context(parts[name]())
                student.load_state_dict(weights)
                found[match]["arms"][arm] = run(args, match, teacher, student, texts, look=arm in ("all on", "all off"))
            step = found[match]["arms"][arm]["step_s"]
            print(f"{match}, {arm}: {1000 * step:.1f} ms a step", file=sys.stderr, flush=True)
    hand_in(found, args.out)


if __name__ == "__main__":
    main()
