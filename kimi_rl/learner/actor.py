"""The learner: a Ray actor that runs one stage and answers with its figures."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from typing import Any

import ray

from kimi_rl.learner.data_parallel import Place
from kimi_rl.learner.stage import StageContext, StageJob


@ray.remote
class Learner:
    """Runs stages in a process of its own, so that each starts clean and gives its memory back."""

    def run(self, job: StageJob) -> dict[str, Any]:
        """Run `job` to its end, from its last whole checkpoint if it has one.

        Returns the stage's result: name, kind, model folder, held-out figures, seconds. One that follows another
        learner (`job.place`) returns nothing.
        """
        # Transformers' progress lines and tips belong to a terminal that this process does not have.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch
        from transformers import set_seed
        from transformers.utils import logging as hf_logging

        from kimi_rl.learner.distill import run_distill
        from kimi_rl.learner.rlvr_stage import run_rlvr
        from kimi_rl.learner.sft import run_sft

        hf_logging.set_verbosity_error()
        torch.set_num_threads(job.threads if job.device != "cpu" else max(1, job.threads // job.place.size))
        set_seed(job.recipe.seed)
        start = time.perf_counter()
        context = StageContext(job)
        try:
            if context.stage.kind == "distill":
                figures = run_distill(context, lambda place: start_beside(job, place))
            else:
                run = {"sft": run_sft, "rlvr": run_rlvr}[context.stage.kind]
                run(context)
                steps, evaluates = context.stage.steps, context.stage.eval is not None
                figures = asdict(context.evaluate(steps, steps, "after")) if evaluates else {}
            if not job.place.leads:
                return {}
            model = context.save_final()
        finally:
            context.close()
        return {
            "name": context.stage.name,
            "kind": context.stage.kind,
            "model": str(model),
            "seconds": time.perf_counter() - start,
            "workers_restarted": context.pool.restarts if context.pool is not None else 0,
            **figures,
        }


def start_beside(job: StageJob, place: Place) -> tuple[Any, ray.ObjectRef]:
    """A learner that trains beside the one that leads, on a card of its own: its actor, and what its work answers."""
    actor = Learner.options(num_cpus=0, num_gpus=0.0 if job.device == "cpu" else 1.0).remote()
    return actor, actor.run.remote(replace(job, place=place))
