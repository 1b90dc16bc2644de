"""Does it learn? Small RLVR experiments on a CPU, three seeds each, with what is switched off beside what is on.

    python benchmarks/rl_experiments.py staleness --work runs/experiments --out benchmarks/results/rl_staleness_cpu.json

staleness: held-out accuracy of synchronous training beside rollouts that run 1 and 4 versions ahead.
tis: an engine whose weights are perturbed with noise, with and without truncated importance sampling.
ptx: SFT on sums and on their successors, RL on the successors, with and without the supervised term on sums: accuracy
on sums.

Every run starts from the same SFT model (made once, kept in `--work`); a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
import trl
from ray import cloudpickle

from kimi_rl.dataset import load_problems
from kimi_rl.evaluate import evaluate
from kimi_rl.learner.rlvr_stage import run_rlvr
from kimi_rl.learner.stage import StageContext, StageJob
from kimi_rl.pipeline import local_ray, train
from kimi_rl.recipe import DataSection, EvalSection, Recipe
from kimi_rl.recipe_load import dump_recipe
from kimi_rl.rollout.pool import RolloutPool, pool_settings
from kimi_rl.rollout.transformers_engine import TransformersEngine
from kimi_rl.run_dir import RunDir

MAX_TOKENS = 32
ARITHMETIC = {"task": "arithmetic", "params": {"level": 2, "digits": 1, "terms": 3}, "held_out_size": 250}
SLIPS = {**ARITHMETIC, "params": {**ARITHMETIC["params"], "slip_share": 0.6}}
ENGINE = {"engine": "transformers", "max_tokens": MAX_TOKENS, "batch_size": 256}
RL = {
    "kind": "rlvr", "steps": 60, "prompts_per_step": 16, "group_size": 8, "learning_rate": 1.0e-4,
    "scale_rewards": "none", "loss_type": "k15", "tau": 0.05, "rollout": ENGINE, "checkpoint_every": 1000,
    "mismatch": {"max_kl": None}, "eval": {"limit": 1},
}  # fmt: skip


class NoisyEngine(TransformersEngine):
    """Samples from weights that are not the learner's: noise, new with every version, on the output layer."""

    def __init__(self, model_folder, *, batch_size, device, engine_args):
        super().__init__(model_folder, batch_size=batch_size, device=device)
        self.noise = engine_args["noise"]

    def finish_update(self, version):
        head = self.model.get_output_embeddings().weight
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            head += self.noise * head.std() * torch.randn(head.shape, generator=generator)
        super().finish_update(version)


def sft_model(work: Path, name: str, data: dict, steps: int) -> Path:
    """The model that all runs of an experiment start from."""
    folder = work / f"sft_{name}"
    if not (folder / "summary.json").exists():
        stage = {
            "kind": "sft", "steps": steps, "batch_size": 32, "learning_rate": 4.0e-3, "warmup_steps": 10,
            "max_length": 128, "rollout": ENGINE, "eval": {"limit": 1},
        }  # fmt: skip
        train(Recipe.model_validate({"name": name, "data": data, "stages": [stage]}), folder)
    return folder / "model"


def run_stage(folder: Path, start: Path, data: dict, stage: dict, seed: int, engine=None) -> dict:
    """One RLVR stage; its curve of training accuracy, mean mismatch, seconds."""
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    recipe = Recipe.model_validate({"name": folder.name, "seed": seed, "data": data, "stages": [stage]})
    run_dir = RunDir.create(folder, dump_recipe(recipe))
    torch.manual_seed(seed)
    context = StageContext(StageJob(recipe, 0, str(folder), str(start), "cpu", torch.get_num_threads(), resume=False))
    if engine is not None:
        context.pool.close()
        settings = pool_settings(
            recipe.stages[0].rollout, model_folder=str(start), max_model_len=256, seed=seed, threads=1, device="cpu"
        )
        context.pool = RolloutPool(**{**settings, "engine": engine})
    begin = time.perf_counter()
    try:
        run_rlvr(context)
        context.save_final()
        rows = [row for row in run_dir.read_metrics() if row["type"] == "train"]
        result = {
            "seed": seed,
            "seconds": time.perf_counter() - begin,
            "train_accuracy": [row["accuracy"] for row in rows],
            "staleness_mean": statistics.fmean(row["staleness_mean"] for row in rows),
            "off_policy_kl": statistics.fmean(row.get("off_policy_kl", row.get("mismatch_kl", 0.0)) for row in rows),
        }
        result["held_out_trained"] = accuracy(context, data)
        result["held_out_other"] = result["held_out_trained"] if data == ARITHMETIC else accuracy(context, ARITHMETIC)
    finally:
        context.close()
    done.write_text(json.dumps(result))
    return result


def accuracy(context: StageContext, section: dict) -> float:
    """Greedy accuracy on held-out problems, with an engine that holds exactly the weights that were saved."""
    problems = load_problems(DataSection.model_validate(section))
    engine = TransformersEngine(str(context.folder / "model"), batch_size=256, policy_version=0)
    figures, _ = evaluate(
        engine.generate,
        lambda pairs: context.verifier.verify_many(list(pairs), kind=problems.answer_kind, extract=("boxed", "hash")),
        [context.prompt_ids(row) for row in problems.held_out["prompt"]],
        list(problems.held_out["answer"]),
        context.decode,
        EvalSection(),
        max_tokens=MAX_TOKENS,
        seed=0,
    )
    return figures.held_out_accuracy


def two_tasks(work: Path) -> tuple[dict, dict]:
    """Local files: sums beside their successors (`after 4-3+5=?` is 7, which 4 in 10 demonstrations get right), and
    the successors alone."""
    both, successors = work / "both", work / "successors"
    for split, count in (("train", 1500), ("test", 250)):
        problems = load_problems(DataSection.model_validate({**ARITHMETIC, "train_size": count, "held_out_size": 250}))
        sums, after = [], []
        for number, row in enumerate(problems.train if split == "train" else problems.held_out):
            plain = {"question": row["question"], "answer": row["answer"], "solution": row["solution"]}
            right = str(int(row["answer"]) + 1)
            said = right if number % 10 < 4 else row["answer"]
            steps = row["solution"].rsplit("####", 1)[0]
            sums.append(plain)
            after.append({"question": f"after {row['question']}", "answer": right, "solution": f"{steps}#### {said}"})
        for folder, rows in ((both, sums + after), (successors, after)):
            folder.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text)
    plain = {"instruction": ""}
    return {"path": str(both), **plain}, {"path": str(successors), **plain}


def experiment(name: str, work: Path, seeds: list[int], steps: int, only: list[str] | None) -> dict[str, list[dict]]:
    """{arm: one result per seed}."""
    rl = {**RL, "steps": steps}
    if name == "staleness":
        start = sft_model(work, "slips", SLIPS, 300)
        # Adam's first steps are as long as its later ones: without a warm-up they outrun what is 4 versions old.
        rl |= {"warmup_steps": 10, "schedule": "linear"}
        sliced = {**rl, "rollout": {**ENGINE, "slice_tokens": 8}}
        arms = {"synchronous": rl, **{str(age): {**sliced, "max_staleness": age} for age in (1, 4)}}
        data, engine = ARITHMETIC, None
    elif name == "tis":
        start = sft_model(work, "slips", SLIPS, 300)
        noisy = {**rl, "rollout": {**ENGINE, "engine_args": {"noise": 1.5}}}
        arms = {"corrected": noisy, "uncorrected": {**noisy, "importance_sampling": {"enabled": False}}}
        data, engine = ARITHMETIC, NoisyEngine
    else:
        both, data = two_tasks(work)
        start, engine = sft_model(work, "both", both, 300), None
        arms = {"without": rl, "with": {**rl, "ptx": {"weight": 1.0, "batch_size": 16, "data": ARITHMETIC}}}
    return {
        arm: [run_stage(work / f"{name}_{arm}_{seed}", start, data, stage, seed, engine) for seed in seeds]
        for arm, stage in arms.items()
        if only is None or arm in only
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["staleness", "tis", "ptx"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--arms", nargs="+", help="Only these, to share the work among several commands.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with local_ray():
        arms = experiment(args.name, args.work, args.seeds, args.steps, args.arms)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "trl": trl.__version__, "transformers": transformers.__version__},
        "mean": {
            arm: {key: statistics.fmean(r[key] for r in rows) for key in ("held_out_trained", "held_out_other")}
            for arm, rows in arms.items()
        },
        "arms": arms,
    }
    print(json.dumps({"mean": result["mean"]}, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    main()
