"""A model that lies elsewhere is served by what was compiled for its twin, with the same tokens."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.gpu

ENGINE = """
import json, sys
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.rollout.vllm_engine import VLLMEngine

arguments = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**30}
arguments["compilation_config"] = {"cudagraph_capture_sizes": [1, 8]}
engine = VLLMEngine(sys.argv[1], max_model_len=128, max_num_seqs=8, dtype="bfloat16", engine_args=arguments)
requests = [Request([10 + i] * (20 + i), seed=i) for i in range(8)]
tokens = [list(c.token_ids) for c in engine.generate(requests, SamplingParams(32, 0.0))]
engine.close()
from vllm.compilation.counter import compilation_counter as counter
print(json.dumps([tokens, counter.num_aot_compiles, counter.num_aot_artifacts_loaded]))
"""


def serve(folder, root, **more):
    environment = os.environ | {"VLLM_CACHE_ROOT": str(root)} | more
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, str(folder)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_twin_is_served_by_what_was_compiled_before(tmp_path):
    pytest.importorskip("vllm")
    from kimi_rl.model.load_save import save_model
    from kimi_rl.model.modeling import KimiLinearForCausalLM
    from kimi_rl.model.presets import build_config
    from kimi_rl.recipe import ModelSection

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    first, twin = tmp_path / "first", tmp_path / "twin"
    for seed, folder in enumerate((first, twin)):
        torch.manual_seed(seed)
        model = KimiLinearForCausalLM(build_config(ModelSection(arch="hybrid", size="small"), vocab_size=512, **ids))
        save_model(model, None, folder)
    shutil.copy(first / "config.json", twin / "config.json")

    _, compiled, loaded = serve(first, tmp_path / "cache")
    assert (compiled, loaded) == (1, 0)
    tokens, compiled, loaded = serve(twin, tmp_path / "cache")
    assert (compiled, loaded) == (0, 1)
    expected, compiled, loaded = serve(twin, tmp_path / "cache", KIMI_RL_COMPILED_ONCE="0")
    assert (compiled, loaded) == (1, 0)
    assert tokens == expected
