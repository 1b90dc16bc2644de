"""Decoding through a CUDA graph: the same as its steps one by one, and close to the engine's plain loop."""

import pytest
import torch
from test_rollout import ragged_prompts
from test_static_decode import close

from kimi_rl.model.load_save import load_model
from kimi_rl.model.modeling import FUSED_DECODE
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.rollout.static_decode import StaticDecoder
from kimi_rl.rollout.transformers_engine import TransformersEngine

pytestmark = pytest.mark.gpu

REQUESTS = [Request(p, 40 + i) for i, p in enumerate(ragged_prompts(12, count=20))]


@pytest.mark.parametrize("arch", ["hybrid", "mla"])
@pytest.mark.parametrize("params", [SamplingParams(40), SamplingParams(40, 0.8, 0.9), SamplingParams(20, 0.0)])
def test_a_graph_draws_what_its_steps_draw(tiny_models, monkeypatch, arch, params):
    folder = str(tiny_models[arch, "dense"])
    monkeypatch.setenv(FUSED_DECODE, "1")
    graph = TransformersEngine(folder, device="cuda", policy_version=0).generate(REQUESTS, params)
    with monkeypatch.context() as patch:
        patch.setattr(StaticDecoder, "_captured", lambda self: None)
        steps = TransformersEngine(folder, device="cuda", policy_version=0).generate(REQUESTS, params)
    # A matrix product may take another algorithm inside a graph, and its last bit decide between two tokens.
    assert close(graph, steps) > 0.9 * sum(len(c.token_ids) for c in steps)
    monkeypatch.setenv(FUSED_DECODE, "0")
    plain = TransformersEngine(folder, device="cuda", policy_version=0).generate(REQUESTS, params)
    # A random model has flat distributions, and bf16 soon leads two loops apart.
    assert close(graph, plain) > 2 * len(REQUESTS)
    if params == SamplingParams(40):
        assert mean_error(folder, graph) < 1.2 * mean_error(folder, plain) < 0.05


def mean_error(folder, completions):
    """Of the log-probs of the sampled tokens, against the model in float32 on a CPU."""
    model, errors = load_model(folder), []
    for request, completion in zip(REQUESTS, completions, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        with torch.no_grad():
            logps = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        found = logps.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        errors += (found - torch.tensor(completion.logprobs)).abs().tolist()
    return sum(errors) / len(errors)


def test_a_graph_sees_updated_weights(tiny_models, monkeypatch):
    monkeypatch.setenv(FUSED_DECODE, "1")
    folder, params = str(tiny_models["hybrid", "dense"]), SamplingParams(20)
    engine = TransformersEngine(folder, device="cuda", policy_version=0)
    engine.generate(REQUESTS, params)
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    engine.begin_update()
    engine.load_weights((name, tensor.cuda()) for name, tensor in to_checkpoint(model))
    engine.finish_update(1)
    after = engine.generate(REQUESTS, params)
    engine._decoders = engine._served = None
    assert [c.token_ids for c in after] == [c.token_ids for c in engine.generate(REQUESTS, params)]
