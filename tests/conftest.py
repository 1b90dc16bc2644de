import os

import pytest

# Small CPU work is faster and steadier without oversubscribed threads.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Files that take longest, and so start first: one that starts last leaves a core idle at the end.
LONGEST_FIRST = ("test_pipeline", "test_whole_comparison", "test_pipeline_vllm", "test_rlvr", "test_pool_faults")


def pytest_collection_modifyitems(items):
    """Long files first. The gpu folder needs a card; everywhere else tests must run."""
    import torch

    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.stem) if item.path.stem in LONGEST_FIRST else 99)

    if torch.cuda.is_available():
        return
    for item in items:
        if "tests/gpu/" in str(item.path).replace(os.sep, "/"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA card"))


@pytest.fixture(scope="session")
def ray_local():
    """One local Ray for the tests that use actors in this process."""
    import ray

    from kimi_rl.pipeline import worker_environment

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": worker_environment()},
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folders of tiny random models in hub layout: {(arch, mlp): path}."""
    from kimi_rl.model.load_save import create_model, save_model
    from kimi_rl.recipe import ModelSection, TokenizerSection
    from kimi_rl.tokenizer import build_tokenizer

    root = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer(TokenizerSection(), [])
    folders = {}
    for arch, mlp in (("hybrid", "dense"), ("mla", "dense"), ("hybrid", "moe")):
        model = create_model(ModelSection(arch=arch, mlp=mlp, size="tiny"), tokenizer, seed=7)
        folder = root / f"{arch}_{mlp}"
        save_model(model, tokenizer, folder)
        folders[arch, mlp] = folder
    return folders


@pytest.fixture
def step(ray_local, tmp_path, tiny_models):
    """Run a stage, with the engine's log-probs shifted by `shift` per token and verdicts from `verify`; returns its
    training rows.

    `rollouts(N)`: of its step N. `weights`: of each stage so far, before and after.
    """
    import torch
    from stages import parity_reward, recipe

    from kimi_rl.learner.rlvr_stage import run_rlvr
    from kimi_rl.learner.stage import StageContext, StageJob
    from kimi_rl.recipe_load import dump_recipe
    from kimi_rl.run_dir import RunDir

    def run(shift=0.0, verify=parity_reward, **settings):
        chosen = recipe(**settings)
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run_dir = RunDir.create(folder, dump_recipe(chosen))
        job = StageJob(chosen, 0, str(folder), str(tiny_models["hybrid", "dense"]), "cpu", 2, resume=False)
        torch.manual_seed(0)
        context = StageContext(job)
        context.verify = verify
        generate = context.pool.generate

        def shifted(requests, params, **how):
            completions = generate(requests, params, **how)
            for completion in completions:
                completion.logprobs[:] = [value + shift for value in completion.logprobs]
            return completions

        context.pool.generate = shifted
        before = weights(context.model)
        try:
            run_rlvr(context)
            run.weights.append((before, weights(context.model)))
        finally:
            context.close()
        run.rollouts = lambda step: run_dir.read_rollouts("rlvr", step)
        return [row for row in run_dir.read_metrics() if row["type"] == "train"]

    def weights(model):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    run.weights = []
    return run
