"""What a fresh KDA layer does: it reads each token itself, forgets as told, and opens its gate by half."""

import math

import torch
from tiny_sources import attention_inputs, make_source

from kimi_rl.convert import kda
from kimi_rl.convert.attention import expand_groups, read_attention, source_heads
from kimi_rl.convert.calibration import fit_constant
from kimi_rl.convert.conversion import target_config
from kimi_rl.kernels.kda_chunk import kda_reference
from kimi_rl.kernels.short_conv import short_conv
from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.recipe import TokenizerSection
from kimi_rl.tokenizer import build_tokenizer

START = kda.KdaStart(4.0, 64.0, -1.5)


def kda_layer(family="llama"):
    model = make_source(family)
    x, _ = attention_inputs(model, 50)
    source = read_attention(model, 1)
    constant = fit_constant(x)
    config = target_config(model.config, build_tokenizer(TokenizerSection(kind="bytes")), 3, 64)
    module = KimiLinearForCausalLM(config).eval().requires_grad_(False).model.layers[1].self_attn
    state = module.state_dict()
    for name, tensor in (kda.kda_tensors(source, constant, 4) | kda.start_tensors(source, constant, START)).items():
        state[name].copy_(tensor)
    return model, module, source, x


def test_projections_are_the_sources_rows():
    model, module, _, _ = kda_layer()
    theirs = model.model.layers[1].self_attn
    assert torch.equal(module.q_proj.weight, theirs.q_proj.weight)
    for name in ("k_proj", "v_proj"):
        rows = getattr(theirs, name).weight.view(2, 16, 64).repeat_interleave(2, dim=0).flatten(0, 1)
        assert torch.equal(getattr(module, name).weight, rows)
    assert torch.equal(module.o_proj.weight, theirs.o_proj.weight)


def test_convolution_starts_as_the_identity():
    _, module, _, x = kda_layer()
    qkv = torch.cat([module.q_proj(x), module.k_proj(x), module.v_proj(x)], dim=-1)[None]
    assert torch.equal(short_conv(qkv, module.conv1d.weight.squeeze(1), activation=None)[0], qkv)


def test_half_lives_and_gates():
    _, module, source, x = kda_layer()
    half = kda.half_lives(16, START)
    assert (half[0], half[7], half[8], half[15]) == (4.0, 64.0, 4.0, 64.0)
    assert torch.all(half[:8].diff() > 0)
    log_decay = module.forget_gate(x[None])[0]  # [T, H, D]
    left = (log_decay * half).exp()
    torch.testing.assert_close(left, torch.full_like(left, 0.5), atol=1e-5, rtol=0)
    assert torch.all(module.g_b_proj(module.g_a_proj(x)) == 0)
    assert module.g_a_proj.weight.abs().min() > 0 or module.g_a_proj.weight.std() > 0.001  # learns from the first step
    assert module.forget_gate.f_a_proj.weight.std() > 0.001
    wanted = START.beta_logit * (x @ fit_constant(x).float())
    torch.testing.assert_close(module.b_proj(x), wanted[:, None].expand(-1, 4), atol=1e-5, rtol=1e-4)


def test_layer_is_the_delta_rule_of_the_sources_heads():
    _, module, source, x = kda_layer()
    q, k, v = (torch.nn.functional.silu(expand_groups(y, 4, 1))[None] for y in source_heads(source, x))
    g = -(math.log(2) / kda.half_lives(16, START)).float().expand(1, len(x), 4, -1)
    o, _ = kda_reference(q, k, v, g, module.b_proj(x)[None].sigmoid())
    normed = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + module.o_norm.variance_epsilon)
    wanted = normed[0].flatten(1) @ source.out.float().flatten(1).T
    torch.testing.assert_close(module(x[None])[0], wanted, atol=1e-4, rtol=1e-4)
