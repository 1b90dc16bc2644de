"""Compiled kernels: where they are kept, and the run that compiles them. Compiling itself needs a card."""

import json
import types
from pathlib import Path

import pytest
import torch
from test_packed_logps import StandIn, make_model

from kimi_rl.errors import InputError
from kimi_rl.kernels.compile_cache import ENV, cache_environment, tuned_environment
from kimi_rl.learner.warm_up import exercise, warm_up
from kimi_rl.pipeline import worker_environment


def test_the_cache_folder_comes_from_the_recipe_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(ENV, raising=False)
    assert cache_environment() == {}
    assert "TRITON_CACHE_DIR" not in worker_environment()
    monkeypatch.setenv(ENV, str(tmp_path / "env"))
    assert cache_environment()["TRITON_CACHE_DIR"] == str(tmp_path / "env" / "triton")
    found = worker_environment(str(tmp_path / "recipe"))
    assert found["TRITON_CACHE_DIR"] == str(tmp_path / "recipe" / "triton")
    assert found["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "recipe" / "inductor")
    assert found["VLLM_CACHE_ROOT"] == str(tmp_path / "recipe" / "vllm")
    assert (tmp_path / "recipe").is_dir()


def test_a_known_card_gets_its_tuning_unless_the_environment_has_its_own(monkeypatch):
    for name in ("FLA_CONFIG_DIR", "FLA_CACHE_MODE"):
        monkeypatch.delenv(name, raising=False)
    found = tuned_environment(["NVIDIA H100 80GB HBM3"] * 2)
    files = list(Path(found["FLA_CONFIG_DIR"]).glob("*.json"))
    assert found["FLA_CACHE_MODE"] == "full" and "chunk_kda_bwd_kernel_intra.json" in {file.name for file in files}
    for file in files:
        entry = json.loads(file.read_text())
        assert entry["kernel_name"] == file.stem and entry["default_config"]["num_warps"] in (1, 2, 4, 8, 16, 32)
    assert tuned_environment(["NVIDIA H200"]) == found
    for cards in ([], ["NVIDIA A100-SXM4-80GB"], ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"]):
        assert tuned_environment(cards) == {}
    monkeypatch.setenv("FLA_CACHE_MODE", "disabled")
    assert tuned_environment(["NVIDIA H100 80GB HBM3"]) == {}


@pytest.mark.parametrize("how", ["recipe", "environment"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, how):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "cache")
    monkeypatch.setenv(ENV, folder)
    with pytest.raises(InputError, match="kernel_cache: cannot" if how == "recipe" else f"{ENV}: cannot"):
        cache_environment(folder if how == "recipe" else None)


@pytest.mark.parametrize("mode", ["packed", "shared_prompt"])
def test_the_exercise_goes_through_every_kernel_and_leaves_no_trace(monkeypatch, mode):
    from kimi_rl.model import modeling

    seen = set()
    for name in ("kda_chunk", "short_conv", "varlen_attention", "token_logprobs", "kda_gate"):
        kernel = getattr(modeling, name)

        def watched(*args, name=name, kernel=kernel, **kwargs):
            seen.add((name, torch.is_grad_enabled(), kwargs.get("initial_state") is not None))
            return kernel(*args, **kwargs)

        monkeypatch.setattr(modeling, name, watched)
    model = make_model()
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.random.get_rng_state()
    exercise(StandIn(model, mode))
    assert torch.equal(torch.random.get_rng_state(), state) and not model.training
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert {(name, grad) for name, grad, _ in seen} == {
        (name, grad)
        for name in ("kda_chunk", "short_conv", "varlen_attention", "token_logprobs", "kda_gate")
        for grad in (False, True)
    }
    assert ("kda_chunk", True, True) in seen or mode == "packed"


def test_the_exercise_grows_to_the_tokens_asked_for():
    shapes = []

    class Stop(Exception):
        pass

    def score(model, ids, mask, right, **options):
        shapes.append(int(mask.sum()))
        raise Stop

    trainer = types.SimpleNamespace(model=make_model(), _get_per_token_logps_and_entropies=score)
    for tokens in (0, 5000):
        with pytest.raises(Stop):
            exercise(trainer, tokens)
    assert shapes[0] == 2 * (70 + 33 + 150 + 90) and 4000 < shapes[1] <= 5000


def test_on_a_cpu_nothing_is_run_or_said():
    def never(*args):
        raise AssertionError("must not be called")

    trainer = types.SimpleNamespace(model=make_model(), _get_per_token_logps_and_entropies=never)
    assert warm_up(trainer, never) is None
