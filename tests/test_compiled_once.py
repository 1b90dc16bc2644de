"""What vLLM's cache of compiled models is found by: the architecture and the settings, not the folder."""

import json
import shutil

import pytest

pytest.importorskip("vllm")

from kimi_rl.rollout import vllm_engine  # noqa: F401 - sets what vLLM reads when it is imported
from kimi_rl.rollout.vllm_plugin import compiled_once, register


def settings_hash(folder, **more):
    from vllm.engine.arg_utils import EngineArgs

    register()
    arguments = {"max_model_len": 64, "skip_tokenizer_init": True, "enable_prefix_caching": False} | more
    return EngineArgs(model=str(folder), dtype="float32", **arguments).create_engine_config().compute_hash()


def other_folder(folder, place, **changes):
    copy = shutil.copytree(folder, place)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def test_a_compiled_model_is_found_again_from_another_folder(tiny_models, tmp_path, monkeypatch):
    folder = tiny_models["hybrid", "dense"]
    twin = other_folder(folder, tmp_path / "twin")
    larger = other_folder(folder, tmp_path / "larger", intermediate_size=512)
    found = settings_hash(folder)
    assert settings_hash(twin, seed=7) == found
    assert len({found, settings_hash(larger), settings_hash(twin, max_model_len=128)}) == 3
    monkeypatch.setenv(compiled_once.SWITCH, "0")
    assert len({found, settings_hash(folder), settings_hash(twin)}) == 3


def test_other_models_keep_their_folder_in_it(tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    for name in "ab":
        config.save_pretrained(tmp_path / name)
    assert settings_hash(tmp_path / "a") != settings_hash(tmp_path / "b")
