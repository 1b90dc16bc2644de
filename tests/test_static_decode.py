"""Decoding in fixed places against the engine's plain loop: the same tokens, whatever the batch does meanwhile."""

import pytest
import torch
from test_rollout import ragged_prompts

from kimi_rl.model.load_save import load_model
from kimi_rl.model.modeling import FUSED_DECODE, KimiLinearForCausalLM
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.model.presets import build_config
from kimi_rl.recipe import ModelSection
from kimi_rl.rollout import static_decode
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.rollout.static_decode import Decoders, ServedWeights, can_decode
from kimi_rl.rollout.transformers_engine import TransformersEngine


def close(a, b) -> int:
    """Tokens that agree before roundings lead two loops apart; their log-probs must be close."""
    compared = 0
    for x, y in zip(a, b, strict=True):
        for token, other, p, q in zip(x.token_ids, y.token_ids, x.logprobs, y.logprobs, strict=False):
            if token != other:
                break
            assert abs(p - q) < 0.05
            compared += 1
    return compared


def both(folder, monkeypatch, requests, params, **options):
    answers = []
    for fused in ("0", "1"):
        monkeypatch.setenv(FUSED_DECODE, fused)
        answers.append(TransformersEngine(str(folder), policy_version=3, **options).generate(requests, params))
    return answers


def same(plain, static):
    assert [c.token_ids for c in plain] == [c.token_ids for c in static]
    for a, b in zip(plain, static, strict=True):
        assert (a.finish_reason, a.policy_version) == (b.finish_reason, b.policy_version)
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch, params", [
    (("hybrid", "dense"), SamplingParams(40)),
    (("mla", "dense"), SamplingParams(20, 0.7, 0.8)),
    (("hybrid", "dense"), SamplingParams(1)),
    (("mla", "dense"), SamplingParams(static_decode.CHUNK + 2, 0.0)),
])  # fmt: skip
def test_the_same_tokens_as_the_plain_loop(tiny_models, monkeypatch, arch, params):
    requests = [Request(p, 50 + i) for i, p in enumerate(ragged_prompts(7, count=11))]
    same(*both(tiny_models[arch], monkeypatch, requests, params, batch_size=6))


def test_rows_move_on_to_smaller_decoders_as_others_stop(tiny_models, monkeypatch):
    """Every token is a stop token with a chance of one in eight or so."""
    sizes, get = [], Decoders.get
    monkeypatch.setattr(Decoders, "get", lambda self, rows, *rest: sizes.append(rows) or get(self, rows, *rest))
    monkeypatch.setattr(static_decode, "CHUNK", 4)
    monkeypatch.setattr("kimi_rl.rollout.transformers_engine.CHUNK", 4)
    requests = [Request(p, 90 + i) for i, p in enumerate(ragged_prompts(8, count=16))]
    init = TransformersEngine.__init__

    def with_many_stops(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.eos_ids = torch.arange(0, self.model.config.vocab_size, 8)

    monkeypatch.setattr(TransformersEngine, "__init__", with_many_stops)
    plain, static = both(tiny_models["hybrid", "dense"], monkeypatch, requests, SamplingParams(40))
    same(plain, static)
    assert len(sizes) >= 3 and sizes == sorted(sizes, reverse=True) and {c.finish_reason for c in static} == {"stop"}


def test_an_update_reaches_decoders_that_exist(tiny_models, monkeypatch):
    monkeypatch.setenv(FUSED_DECODE, "1")
    folder = str(tiny_models["hybrid", "dense"])
    engine = TransformersEngine(folder, policy_version=0)
    requests, params = [Request(p, i) for i, p in enumerate(ragged_prompts(9, count=3))], SamplingParams(12)
    before = engine.generate(requests, params)
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    engine.begin_update()
    engine.load_weights(to_checkpoint(model))
    engine.finish_update(1)
    after = engine.generate(requests, params)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    monkeypatch.setenv(FUSED_DECODE, "0")
    same(engine.generate(requests, params), after)


def test_served_weights_are_the_rounded_ones_in_lasting_places():
    section = ModelSection(size="tiny")
    model = KimiLinearForCausalLM(build_config(section, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    served = ServedWeights(model.requires_grad_(False), torch.bfloat16)
    places = {name: p.data_ptr() for name, p in served.model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    served.refresh()
    narrow = 0
    for (name, mine), (_, theirs) in zip(served.model.named_parameters(), model.named_parameters(), strict=True):
        assert places[name] == mine.data_ptr() and torch.equal(mine, theirs.to(mine.dtype)), name
        narrow += mine.dtype == torch.bfloat16
        assert mine.dtype == torch.bfloat16 or mine.data_ptr() == theirs.data_ptr(), "what stays wide is shared"
    assert narrow > 40 and served.model.model.embed_tokens.weight.dtype == torch.float32
    assert served.model.model.layers[0].self_attn.forget_gate.A_log.dtype == torch.float32


def test_under_autocast_both_loops_stay_close(tiny_models, monkeypatch):
    """A card's dtypes, on a CPU: log-probs of the first tokens, until roundings lead the loops apart."""
    engine = TransformersEngine(str(tiny_models["hybrid", "dense"]), policy_version=0)
    requests = [Request(p, 30 + i) for i, p in enumerate(ragged_prompts(10, count=6))]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain, static = (loop(requests, SamplingParams(8)) for loop in (engine._decode, engine._decode_static))
    assert close(plain, static) >= 12


def test_a_model_with_routers_takes_the_plain_loop(tiny_models):
    assert can_decode(load_model(str(tiny_models["mla", "dense"])))
    assert not can_decode(load_model(str(tiny_models["hybrid", "moe"])))
