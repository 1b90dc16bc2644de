"""A whole run: check everything, then run the recipe's stages one after another, each in its own learner actor."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kimi_rl.card_share import card_share, part, whole_cards
from kimi_rl.errors import InputError, RunError
from kimi_rl.kernels.compile_cache import cache_environment, tuned_environment
from kimi_rl.progress import ProgressView, follow
from kimi_rl.recipe import DistillStage, ModelSection, Recipe, RLVRStage, SFTStage
from kimi_rl.recipe_load import dump_recipe
from kimi_rl.report import write_report
from kimi_rl.run_dir import RunDir, describe_environment, gpu_names, only_one, usable_cores


def train(
    recipe: Recipe, out: Path, *, resume: bool = False, view: ProgressView | None = None, until: str | None = None
) -> dict[str, Any]:
    """Run `recipe` into the run directory `out`; returns what `summary.json` holds.

    `until`: the stage after which to stop; `status` is then "stopped", and `resume` goes on from there.

    Raises:
        InputError: bad data, model or folder; nothing has been written.
        RunError: the run could not go on; the run directory holds everything up to that point.
    """
    wanted = _stages_until(recipe, until)
    check_inputs(recipe)
    with _opened(out, dump_recipe(recipe), resume) as run_dir:
        state = run_dir.load_state()
        done: list[dict[str, Any]] = state.get("stages", [])
        start = time.time()
        if len(done) < wanted or (wanted == len(recipe.stages) and state.get("status") != "finished"):
            run_dir.write_environment(describe_environment())
            _run_stages(recipe, run_dir, done, resume, view, wanted)
        complete = len(done) == len(recipe.stages)
        summary = {
            "status": "complete" if complete else "stopped",
            "name": recipe.name,
            "seed": recipe.seed,
            "model": str(run_dir.path / "model") if complete else done[-1]["model"],
            "seconds": sum(stage["seconds"] for stage in done),
            "wall_seconds": time.time() - start,
            "stages": done,
        }
        run_dir.write_summary(summary)
        write_report(run_dir.path)
        return summary


def _stages_until(recipe: Recipe, until: str | None) -> int:
    """How many of the recipe's stages are to be run."""
    names = [stage.name for stage in recipe.stages]
    if until is None:
        return len(names)
    if until not in names:
        raise InputError(f"--until: no stage {until!r} in {recipe.name}; stages: {', '.join(names)}")
    return names.index(until) + 1


@contextlib.contextmanager
def _opened(out: Path, recipe_yaml: str, resume: bool) -> Iterator[RunDir]:
    """The run directory, held by this process alone. A run that was just killed may need a moment to be gone."""
    with contextlib.ExitStack() as held:
        lock = only_one(out, "another run is writing there", wait_s=20.0)
        if resume and out.is_dir():  # before `create`, which removes what it takes for left over
            held.enter_context(lock)
            yield RunDir.create(out, recipe_yaml, resume=True)
        else:
            run_dir = RunDir.create(out, recipe_yaml, resume=resume)
            held.enter_context(lock)
            yield run_dir


def check_inputs(recipe: Recipe) -> None:
    """Read the data and look at the model's folder, so that mistakes show before anything is written or loaded."""
    for name in recipe.report_to:
        if find_spec(name) is None:
            raise InputError(f"report_to: {name} is not installed; run `pip install {name}` or take it out")

    cache_environment(recipe.kernel_cache)

    from kimi_rl.dataset import load_problems
    from kimi_rl.model.presets import build_config
    from kimi_rl.rewards.kinds import load_function

    if recipe.model.path is None:
        build_config(recipe.model, vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    else:
        check_start(recipe)
    for term in recipe.reward.terms:
        if ":" in term.use:
            load_function(term.use)
    for data in recipe.all_data():
        load_problems(data)
    for stage in recipe.stages:
        if stage.kind == "distill":
            check_distillation(recipe, stage)


def check_distillation(recipe: Recipe, stage: DistillStage) -> None:
    """Teacher and student must fit and the file of texts must be whole; reads configurations, no weights."""
    from kimi_rl.learner.teacher import check_pair
    from kimi_rl.learner.texts import check_texts
    from kimi_rl.model.presets import recipe_config
    from kimi_rl.model.source import read_source_config

    where = f"stages.{stage.name}.teacher"
    # The vocabulary of a model built from scratch is known once its tokenizer is.
    known = recipe.model.path is not None
    check_pair(read_source_config(stage.teacher, where), recipe_config(recipe), where, vocabulary=known)
    if stage.texts is not None:
        check_texts(stage.texts, f"stages.{stage.name}.texts")


def check_start(recipe: Recipe) -> None:
    """`model.path` is a Kimi Linear model, or a plain transformer with nothing but sft stages that do not evaluate:
    engines take weight updates of Kimi Linear alone."""
    from kimi_rl.model.source import is_gguf, is_source

    path = recipe.model.path
    if not is_gguf(path):
        check_model_folder(path)
    if Path(path).exists() and is_source(path):
        for stage in recipe.stages:
            if stage.kind != "sft" or stage.eval is not None:
                what = f"is of kind {stage.kind}" if stage.kind != "sft" else "evaluates"
                raise InputError(
                    f"model.path: {path} is a plain transformer, which only sft stages with `eval: null` can tune; "
                    f"stage {stage.name} {what}. Make a Kimi Linear model of it with `kimi-rl convert`, or measure it "
                    "with `kimi-rl eval`"
                )


def check_model_folder(path: str) -> None:
    """A local model folder must hold a config.json; anything that is not a local path is taken for a hub id."""
    folder = Path(path)
    looks_local = folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (folder / "config.json").is_file():
        found = "no such folder" if not folder.exists() else "no config.json in it"
        raise InputError(f"model.path: {path}: {found}; give a folder in Hugging Face layout or a hub id")


def check_cards(recipe: Recipe, found: int, device: str) -> None:
    """There must be a card for each learner, and for the workers where they have some: Ray would wait for ever."""
    for stage in recipe.stages:
        learners = learners_of(stage)
        if device != "cpu" and 1 < learners > found:
            raise InputError(
                f"stages.{stage.name}.learners: {learners}, a card each, but this run may use {found} whole NVIDIA "
                "cards; set it to 1"
            )
        cards = stage.rollout.cards
        if cards and found < 1 + cards:
            raise InputError(
                f"stages.{stage.name}.rollout.cards: {cards} for the workers and one for the learner, but this run may "
                f"use {found} whole NVIDIA cards; set it to 0 to let them share one"
            )


def learners_of(stage: SFTStage | DistillStage | RLVRStage) -> int:
    """Processes that train it."""
    return stage.learners if stage.kind == "distill" else 1


@contextlib.contextmanager
def local_ray(kernel_cache: str | None = None) -> Iterator[None]:
    """Ray for the time of a run: the cluster of `RAY_ADDRESS` or one on this machine; one that is up already stays."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    ray.init(
        address=address,
        # Actors ask for no CPU. Ray starts an idle process for each that it has, on a large machine more than help.
        num_cpus=None if address else min(8, usable_cores()),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        namespace="kimi_rl",
        runtime_env={"env_vars": worker_environment(kernel_cache)},
    )
    try:
        yield
    finally:
        ray.shutdown()


def _run_stages(
    recipe: Recipe, run_dir: RunDir, done: list[dict[str, Any]], resume: bool, view: ProgressView | None, wanted: int
) -> None:
    """The first `wanted` stages, less those in `done`, which grows."""
    import ray

    stop = threading.Event()
    follower = None
    if view is not None:
        follower = threading.Thread(target=follow, args=(run_dir.path / "metrics.jsonl", view, stop), daemon=True)
        follower.start()
    try:
        with local_ray(recipe.kernel_cache):
            run_dir.save_state({"status": "running", "stages": done})
            device = "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"
            check_cards(recipe, whole_cards(), device)
            start_model = done[-1]["model"] if done else _start_model(recipe, run_dir, view)
            for index in range(len(done), wanted):
                result = _run_stage(recipe, index, run_dir, start_model, device, resume)
                start_model = result["model"]
                done.append(result)
                run_dir.save_state({"status": "running", "stages": done})
        if len(done) == len(recipe.stages):
            run_dir.publish_model(Path(start_model))
            run_dir.save_state({"status": "finished", "stages": done})
    except Exception as error:
        run_dir.save_state({"status": "failed", "error": str(error), "stages": done})
        run_dir.write_summary({"status": "failed", "name": recipe.name, "error": str(error), "stages": done})
        write_report(run_dir.path)
        raise
    finally:
        stop.set()
        if follower is not None:
            follower.join(timeout=5)


def worker_environment(kernel_cache: str | None = None) -> dict[str, str]:
    """Environment of Ray's workers: the same package as this process, threads that do not spin, the kernels' cache.

    Learner and rollout workers take turns on the same cores; OpenMP threads that spin while they wait would take
    them from whoever's turn it is.
    """
    import kimi_rl

    root = str(Path(kimi_rl.__file__).resolve().parent.parent)
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        **cache_environment(kernel_cache),
        **tuned_environment(gpu_names()),
    }


def describe_size(recipe: Recipe) -> str:
    """One line: the preset, its parameters, and how far its twin of the other architecture is from it."""
    from kimi_rl.model.presets import build_config, describe

    def total(section: ModelSection) -> int:
        config = build_config(section, vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=3)
        counts = describe(config)
        return counts["total"] - counts["embedding"]

    section = recipe.model
    ours = total(section)
    text = f"{section.arch} {section.size} {section.mlp}, {ours:,} parameters without embeddings"
    if section.layer_types is not None:
        return text
    other = "mla" if section.arch == "hybrid" else "hybrid"
    theirs = total(section.model_copy(update={"arch": other}))
    return f"{text} ({other} of this size: {theirs:,}, {abs(theirs / ours - 1):.2%} apart)"


def _start_model(recipe: Recipe, run_dir: RunDir, view: ProgressView | None) -> str:
    """The folder of the model that the first stage starts from: the recipe's, or a new one made from its seed."""
    if recipe.model.path is not None:
        return recipe.model.path
    folder = run_dir.path / "stages" / "start" / "model"
    if not (folder / "config.json").is_file():
        if view is not None:
            view.status(f"building the model: {describe_size(recipe)}")
        from transformers.utils import logging

        from kimi_rl.dataset import load_problems
        from kimi_rl.model.load_save import create_model, save_model
        from kimi_rl.tokenizer import build_tokenizer

        logging.disable_progress_bar()
        train_rows = load_problems(recipe.data).train
        texts = [f"{q}\n{s}" for q, s in zip(train_rows["question"], train_rows["solution"], strict=True)]
        tokenizer = build_tokenizer(recipe.tokenizer, texts)
        save_model(create_model(recipe.model, tokenizer, recipe.seed), tokenizer, folder)
    return str(folder)


def _run_stage(
    recipe: Recipe, index: int, run_dir: RunDir, start_model: str, device: str, resume: bool
) -> dict[str, Any]:
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    from kimi_rl.learner.actor import Learner
    from kimi_rl.learner.data_parallel import Place
    from kimi_rl.learner.stage import StageJob

    stage = recipe.stages[index]
    job = StageJob(
        recipe=recipe,
        index=index,
        run_dir=str(run_dir.path),
        start_model=start_model,
        device=device,
        threads=recipe.threads or os.cpu_count() or 1,
        resume=resume,
        place=Place(size=learners_of(stage)),
    )
    share = 1.0 if stage.rollout.cards or job.place.size > 1 else part(0.5 * card_share())
    learner = Learner.options(num_cpus=0, num_gpus=0.0 if device == "cpu" else share).remote()
    name = stage.name
    try:
        return ray.get(learner.run.remote(job))
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        if isinstance(cause, InputError | RunError):
            raise cause from None
        raise RunError(
            f"stage {name} failed: {type(cause).__name__}: {cause}; go on with --resume once it is mended"
        ) from error
    except RayActorError as error:
        raise RunError(f"stage {name}: the learner process died ({error}); go on with --resume") from error
    finally:
        ray.kill(learner)
