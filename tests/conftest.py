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
