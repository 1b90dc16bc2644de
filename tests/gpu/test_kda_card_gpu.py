"""vLLM on a card with KDA layers that decode in one kernel, beside vLLM's own layers: two engines, one model."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from kimi_rl.rollout.vllm_plugin import KDA_STEP

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
# Completions end at different times, at the model's limit: of prompts of 70 to 150 tokens, in batches that shrink below
# the sizes of the graphs. More requests than seats, so that new ones take the slots of those that have ended.
ENGINE = """
    import json, sys
    import torch
    from kimi_rl.rollout.engine import Request, SamplingParams
    from kimi_rl.rollout.vllm_engine import VLLMEngine

    folder, result, mode = sys.argv[1:]
    arguments = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**31}
    arguments["compilation_config"] = {"cudagraph_mode": mode}
    engine = VLLMEngine(folder, max_model_len=160, max_num_seqs=13, dtype="bfloat16", engine_args=arguments)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 4096, (70 + 4 * i,), generator=draw).tolist() for i in range(21)]
    requests = [Request(prompt, seed=i) for i, prompt in enumerate(prompts)]
    greedy, sampled = (engine.generate(requests, SamplingParams(80, temperature=t)) for t in (0.0, 1.0))
    found = {"greedy": [[a.token_ids, a.logprobs] for a in greedy], "sampled": [a.logprobs[:-1] for a in sampled]}
    found["scored"] = engine.score(prompts, [a.token_ids[:-1] for a in sampled])  # a prompt may not fill the model
    found["layers"] = sorted({type(m).__name__ for m in engine._model.modules() if "Delta" in type(m).__name__})
    found["mode"] = str(engine._llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)
    with open(result, "w") as file:
        json.dump(found, file)
    engine.close()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(switch, CUDA graphs) -> what an engine in a process of its own answered; all share vLLM's cache of graphs."""
    pytest.importorskip("vllm.model_executor.models.kimi_linear")
    from kimi_rl.model.load_save import save_model
    from kimi_rl.model.modeling import KimiLinearForCausalLM
    from kimi_rl.model.presets import build_config
    from kimi_rl.recipe import ModelSection

    root = tmp_path_factory.mktemp("engines")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(build_config(ModelSection(arch="hybrid", size="base"), vocab_size=4096, **ids))
    folder = save_model(model, None, root / "model")
    known = {}
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def answer(switch, mode):
        if (switch, mode) not in known:
            result = root / f"{switch}_{mode}.json"
            run = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(ENGINE), str(folder), str(result), mode],
                cwd=ROOT,
                env=os.environ | {KDA_STEP: switch, "VLLM_CACHE_ROOT": str(root / "cache"), **path},
                capture_output=True,
                text=True,
                timeout=500,
            )
            assert run.returncode == 0, run.stderr[-4000:]
            known[switch, mode] = json.loads(result.read_text())
        return known[switch, mode]

    return answer


def gap_to_prefill(found):
    """Mean difference of the log-probs that tokens were drawn with, in decoding, from those that a prefill gives."""
    gaps = [
        abs(a - b)
        for drawn, scored in zip(found["sampled"], found["scored"], strict=True)
        for a, b in zip(drawn, scored, strict=True)
    ]
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE", "NONE"])
def test_decodes_as_vllms_own_layers_do(answers, mode):
    plain, ours = answers("0", "FULL_AND_PIECEWISE"), answers("1", mode)
    assert plain["layers"] == ["KimiGatedDeltaNetAttention"] and ours["layers"] == ["CardKimiDeltaAttention"]
    assert ours["mode"].endswith(mode)
    lengths = {len(tokens) for tokens, _ in ours["greedy"]}
    assert len(lengths) > 10, "sequences end at different times"
    gaps = []
    for (tokens, logprobs), (others, theirs) in zip(ours["greedy"], plain["greedy"], strict=True):
        same = next((n for n, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), len(tokens))
        gaps += [abs(a - b) for a, b in zip(logprobs[:same], theirs[:same], strict=True)]
    assert len(gaps) > 200, "rounding alone makes greedy tokens differ late"
    assert sum(gaps) / len(gaps) < 0.02 and max(gaps) < 0.2
    # Teacher-forced: each engine's own samples, decoded, beside vLLM's prefill of them. A state that a row of padding
    # or a sequence that has ended had written to would show here.
    assert gap_to_prefill(ours) < 1.5 * gap_to_prefill(plain) + 1e-3
