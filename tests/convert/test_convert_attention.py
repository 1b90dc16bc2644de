"""The source's attention written out, and its exact counterparts: grouped heads, MLA at full rank."""

import pytest
import torch
from tiny_sources import attention_inputs, make_source

from kimi_rl.convert import mla
from kimi_rl.convert.attention import (
    expand_groups,
    read_attention,
    rotate,
    softmax_attention,
    source_heads,
    watch_heads,
)
from kimi_rl.convert.calibration import fit_constant, fit_output, head_scales
from kimi_rl.errors import InputError
from kimi_rl.kernels.kda_chunk import kda_reference

FAMILIES = ("llama", "qwen2", "qwen3")


def attention_of(family, tokens=40, **changes):
    model = make_source(family, **changes).double()
    x, y = attention_inputs(model, tokens)
    return read_attention(model, 1), x, y


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_give_the_sources_attention(family):
    source, x, y = attention_of(family)
    q, k, v = source_heads(source, x)
    _, o = softmax_attention(q, k, v, source.scale, source.frequencies)
    # transformers computes cos and sin in float32, and so does the softmax of its eager form.
    torch.testing.assert_close(torch.einsum("thv,dhv->td", o, source.out), y, atol=2e-6, rtol=2e-6)


def test_mla_at_full_rank_with_the_rotary_part_is_the_sources_attention():
    source, x, y = attention_of("llama")
    looks = watch_heads(source, x, [0, len(x)])
    factors = mla.factorise(source, source.key, source.value, x, looks, rank=64)
    q, k, v = source_heads(source, x)
    _, o = softmax_attention(q, k, v, source.scale, source.frequencies)
    wanted = torch.einsum("thv,dhv->td", o, source.out)
    torch.testing.assert_close(mla.reference_mla(source, factors, x), wanted, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(mla.reference_mla(source, factors, x), y, atol=2e-6, rtol=2e-6)
    assert factors.lost == 0.0


def test_expanded_heads_are_the_grouped_ones():
    source, x, _ = attention_of("llama")
    q, k, v = source_heads(source, x)
    heads = source.heads
    grouped = softmax_attention(q, k, v, source.scale)[1]
    assert torch.equal(grouped, softmax_attention(q, *(expand_groups(y, heads, 1) for y in (k, v)), source.scale)[1])
    # The same for a delta rule: each head on its own, with the keys of its group, gives what all give together.
    g, beta = -torch.rand(1, len(x), heads, source.head_dim).double(), torch.rand(1, len(x), heads).double()
    k, v = (expand_groups(y, heads, 1)[None] for y in (k, v))
    together, _ = kda_reference(q[None], k, v, g, beta)
    for head in range(heads):
        one = slice(head, head + 1)
        group = source_heads(source, x)[1][:, head // 2 : head // 2 + 1][None]
        alone, _ = kda_reference(q[None, :, one], group, v[:, :, one], g[:, :, one], beta[:, :, one])
        torch.testing.assert_close(together[:, :, one], alone, atol=1e-12, rtol=1e-12)


def test_turn_is_the_mean_rotation_by_attention_weight():
    source, x, _ = attention_of("llama", tokens=12)
    looks = watch_heads(source, x, [0, 5, 12])
    wanted = torch.zeros_like(looks.turn)
    total = torch.zeros(source.heads, dtype=torch.float64)
    for part in (x[:5], x[5:]):
        weights, _ = softmax_attention(*source_heads(source, part), source.scale, source.frequencies)
        for i in range(len(part)):
            for j in range(1, i + 1):
                wanted += weights[:, i, j, None] * torch.exp(1j * source.frequencies * (i - j))
                total += weights[:, i, j]
    torch.testing.assert_close(looks.turn, wanted / total[:, None])
    # Where a head looks back one distance only, turned queries without rotation score as rotated ones do.
    distance = 3
    turn = torch.exp(1j * source.frequencies * distance).expand(source.heads, -1)
    turned = torch.einsum("td,hkd->thk", x, mla.turn_queries(source.query, turn))
    q, k, _ = source_heads(source, x)
    k = expand_groups(k, source.heads, 1)
    angles = torch.arange(len(x))[:, None] * source.frequencies
    rotated = (rotate(q, angles)[distance:] * rotate(k, angles)[:-distance]).sum(-1)
    torch.testing.assert_close((turned[distance:] * k[:-distance]).sum(-1), rotated)


def test_low_rank_weighs_what_the_output_feels():
    source, x, _ = attention_of("llama", tokens=300)
    looks = watch_heads(source, x, [0, len(x)])
    stacked = torch.cat([source.key.flatten(0, 1), source.value.flatten(0, 1)])
    root = mla._block_roots(source, looks)

    def weighted(approximation):
        return float(((stacked - approximation) @ x.T).T.matmul(root.T).square().sum())

    errors = []
    for rank in (8, 16, 32):
        factors = mla.factorise(source, source.key, source.value, x, looks, rank)
        errors.append(weighted(factors.up @ factors.down))
        assert factors.lost == pytest.approx(errors[-1] / weighted(0 * stacked), rel=1e-6)
        left, sizes, right = torch.linalg.svd(stacked, full_matrices=False)
        plain = left[:, :rank] * sizes[:rank] @ right[:rank]
        assert errors[-1] < 0.9 * weighted(plain)
    assert errors[0] > errors[1] > errors[2]


def test_latent_has_nearly_constant_size():
    source, x, _ = attention_of("llama", tokens=300)
    looks = watch_heads(source, x, [0, len(x)])
    spreads = []
    for rank in (16, 56, 64):
        down = mla.factorise(source, source.key, source.value, x, looks, rank).down
        directions = down * source.input_norm
        torch.testing.assert_close(directions @ directions.T, torch.eye(rank).double(), atol=1e-9, rtol=0)
        spreads.append(mla.latent_size(x, down)[1])
    assert spreads[0] > spreads[1] > spreads[2]
    assert spreads[2] < 1e-3  # full width: only the eps of the norm in front is left


def test_biases_and_norms_are_absorbed_where_the_states_allow():
    source, x, _ = attention_of("qwen2", tokens=300)
    x = x + 3.0 * x.std()  # states with a common part, as trained models have
    constant = fit_constant(x)
    assert float((x @ constant - 1).square().mean()) < 0.01
    query, key, value = mla.absorb(source, x, constant)
    wanted = source_heads(source, x)
    # float64 [T, H, D] against the biased projections; the keys' bias is left out on purpose.
    for weight, y in ((query, wanted[0]), (value, wanted[2]), (key, wanted[1] - source.key_bias)):
        got = torch.einsum("td,hkd->thk", x, weight)
        assert float((got - y).square().mean()) < 0.01 * float(y.square().mean())
    # What the keys' bias adds to a score is the same for all keys, and a softmax does not see it.
    q, k, v = wanted
    with_bias = softmax_attention(q, k, v, source.scale)[1]
    torch.testing.assert_close(softmax_attention(q, k - source.key_bias, v, source.scale)[1], with_bias)

    source, x, _ = attention_of("qwen3", tokens=300)
    query, key, _ = mla.absorb(source, x, fit_constant(x))
    for weight, y in zip((query, key), source_heads(source, x)[:2], strict=True):
        got = torch.einsum("td,hkd->thk", x, weight)
        plain = float((got - y).square().sum() / y.square().sum())
        assert plain < 0.1
        for factor in (0.9, 1.1):
            assert float((factor * got - y).square().sum() / y.square().sum()) > plain - 0.02


def test_least_squares_of_the_output():
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(500, 12, generator=generator).double()
    out = torch.randn(7, 3, 4, generator=generator).double()
    scales = torch.tensor([0.5, 2.0, -1.0]).double()
    y = f @ (out * scales[:, None]).flatten(1).T
    gram, cross = f.T @ f, f.T @ y
    torch.testing.assert_close(head_scales(gram, cross, out), scales, atol=0.01, rtol=0.01)
    start = torch.zeros(7, 12).double()
    wanted = (out * scales[:, None]).flatten(1)
    torch.testing.assert_close(fit_output(gram, cross, wanted, 500), wanted)  # nothing to gain, nothing changed
    errors = [float((fit_output(gram, cross, start, tokens) - wanted).norm()) for tokens in (5, 500, 50000)]
    assert errors[0] > errors[1] > errors[2]


def test_what_has_no_counterpart_is_refused():
    with pytest.raises(InputError, match="bias on the attention's output"):
        read_attention(make_source("llama", attention_bias=True), 0)
    with pytest.raises(InputError, match="turns 8 of the heads' 16 channels"):
        model = make_source("llama")
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:4]
        read_attention(model, 0)
