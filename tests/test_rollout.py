"""The transformers engine against a plain forward, and its sampling against closed forms."""

import numpy as np
import pytest
import torch
from nucleus import logprob_error
from routing import settled_tokens

from kimi_rl.model.load_save import load_model
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.rollout.sampling import draw, processed_logprobs, uniforms
from kimi_rl.rollout.transformers_engine import TransformersEngine

ARCHS = [("hybrid", "dense"), ("mla", "dense"), ("hybrid", "moe")]


def ragged_prompts(seed, count=9, vocab=200):
    rng = np.random.default_rng(seed)
    return [rng.integers(10, vocab, size=n).tolist() for n in rng.integers(1, 40, size=count)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.7, 0.8)])
def test_sampled_logprobs_equal_a_plain_forward(tiny_models, arch, temperature, top_p):
    seed = int(torch.seed() % 2**31)
    print("seed", seed)
    engine = TransformersEngine(str(tiny_models[arch]), batch_size=4, policy_version=0)
    model = load_model(str(tiny_models[arch])).eval()
    prompts = ragged_prompts(seed)
    completions = engine.generate(
        [Request(p, seed + i) for i, p in enumerate(prompts)], SamplingParams(24, temperature, top_p)
    )
    compared = total = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        # The token after the last settled one is the last that no close call stands before.
        sure = max(0, min(settled_tokens(model, ids) - len(prompt) + 1, len(completion.token_ids)))
        compared, total = compared + sure, total + len(completion.token_ids)
        found = completion.token_ids[:sure], completion.logprobs[:sure]
        assert not sure or logprob_error(logits[:sure], *found, temperature, top_p) < 1e-4
    assert compared == total if arch[1] == "dense" else compared > 0.5 * total


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_tokens_equal_a_plain_forward(tiny_models, arch):
    engine = TransformersEngine(str(tiny_models[arch]), batch_size=8, policy_version=0)
    model = load_model(str(tiny_models[arch])).eval()
    prompts = ragged_prompts(3, count=4)
    for prompt, completion in zip(
        prompts, engine.generate([Request(p, 0) for p in prompts], SamplingParams(12, 0.0)), strict=True
    ):
        ids = list(prompt)
        for token in completion.token_ids:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_samples_depend_on_their_seed_alone(tiny_models):
    folder = str(tiny_models["hybrid", "dense"])
    prompts = ragged_prompts(11)
    requests = [Request(p, 100 + i) for i, p in enumerate(prompts)]
    params = SamplingParams(16)
    wide = TransformersEngine(folder, batch_size=64, policy_version=0).generate(requests, params)
    narrow = TransformersEngine(folder, batch_size=2, policy_version=0).generate(requests[::-1], params)[::-1]
    assert [c.token_ids for c in wide] == [c.token_ids for c in narrow]
    other = TransformersEngine(folder, batch_size=64, policy_version=0).generate(
        [Request(p, 200 + i) for i, p in enumerate(prompts)], params
    )
    assert [c.token_ids for c in wide] != [c.token_ids for c in other]


def test_stop_and_length_reasons(tiny_models):
    engine = TransformersEngine(str(tiny_models["hybrid", "dense"]), policy_version=5)
    prompts = ragged_prompts(5, count=40)
    completions = engine.generate([Request(p, i) for i, p in enumerate(prompts)], SamplingParams(60))
    eos = engine.eos_ids.tolist()
    assert {c.finish_reason for c in completions} == {"stop", "length"}, "want both kinds in this sample"
    for completion in completions:
        assert completion.policy_version == 5
        assert len(completion.token_ids) == len(completion.logprobs)
        if completion.finish_reason == "stop":
            assert completion.token_ids[-1] in eos and not set(completion.token_ids[:-1]) & set(eos)
        else:
            assert len(completion.token_ids) == 60 and completion.token_ids[-1] not in eos


def test_draw_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    logprobs = processed_logprobs(logits, 1.0, 1.0).expand(20000, -1)
    tokens, chosen = draw(logprobs, uniforms([1], 20000)[0], greedy=False)
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    expected = logits.softmax(-1)[0]
    assert (shares - expected).abs().max() < 4 * 0.5 / len(tokens) ** 0.5
    assert torch.equal(chosen, logprobs[0][tokens])


def test_top_p_keeps_the_smallest_covering_set():
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    kept = processed_logprobs(probs.log(), 1.0, 0.75).exp()
    assert torch.allclose(kept, torch.tensor([[0.625, 0.375, 0.0, 0.0]]), atol=1e-6)
    only_first = processed_logprobs(probs.log(), 1.0, 0.01).exp()
    assert torch.allclose(only_first, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    cold = processed_logprobs(probs.log(), 0.5, 1.0).exp()
    assert torch.allclose(cold, (probs**2) / (probs**2).sum(), atol=1e-6)
