"""Our two layers for vLLM with the same random weights and states: the one for a card, and the one for a CPU."""

from types import SimpleNamespace

import torch
from torch import nn
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from kimi_rl.rollout.vllm_plugin import kda, kda_card
from kimi_rl.rollout.vllm_plugin.kda import CpuKimiDeltaAttention
from kimi_rl.rollout.vllm_plugin.kda_card import CardKimiDeltaAttention

HEADS, DIM, WIDTH, STATES = 2, 8, 4, 9
CHANNELS = HEADS * DIM
NAME = "model.layers.0.self_attn"


class Norm(nn.Module):
    """vLLM's `FusedRMSNormGated` with the sigmoid."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), 1e-5

    def forward_cuda(self, x, gate):
        x_, gate_ = x.float(), gate.float()
        x_ = x_ * torch.rsqrt(x_.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return (x_ * gate_.sigmoid()).to(x.dtype)

    forward = forward_cuda


def weight_of(tensor):
    module = nn.Module()
    module.weight, module.bias = nn.Parameter(tensor), None
    return module


def caches(dtype, dim_first):
    """The two caches of a group, both states of a slot in one page as vLLM lays them."""
    conv_bytes = 3 * CHANNELS * (WIDTH - 1) * dtype.itemsize
    state_bytes = HEADS * DIM * DIM * 4
    pages = torch.zeros(STATES, conv_bytes + state_bytes + 64, dtype=torch.uint8)
    conv = pages[:, :conv_bytes].view(dtype)
    conv = conv.unflatten(1, (3 * CHANNELS, WIDTH - 1) if dim_first else (WIDTH - 1, 3 * CHANNELS))
    state = pages[:, conv_bytes : conv_bytes + state_bytes].view(torch.float32).unflatten(1, (HEADS, DIM, DIM))
    conv.normal_()
    state.normal_()
    return pages, (conv, state)


def make_layers(dtype, dim_first):
    """(card, CPU) layers whose caches hold the same, and the card's pages."""
    card, cpu = (kind.__new__(kind) for kind in (CardKimiDeltaAttention, CpuKimiDeltaAttention))
    taps = torch.randn(3, CHANNELS, 1, WIDTH)
    norm, a_log, dt_bias = torch.randn(DIM, dtype=dtype), torch.randn(HEADS), torch.randn(CHANNELS)
    for layer in (card, cpu):
        nn.Module.__init__(layer)
        layer.prefix, layer.local_num_heads, layer.head_dim, layer.conv_size = NAME, HEADS, DIM, WIDTH
        layer.dt_bias, layer.o_norm = nn.Parameter(dt_bias), Norm(norm)
    card.q_conv1d, card.k_conv1d, card.v_conv1d = (weight_of(part) for part in taps)
    cpu.conv1d = weight_of(taps.flatten(0, 1))
    card.A_log, cpu.A_log = nn.Parameter(a_log.view(1, 1, HEADS, 1)), nn.Parameter(a_log)
    pages, card.kv_cache = caches(dtype, dim_first)
    cpu.kv_cache = tuple(x.clone() for x in card.kv_cache)
    return card, cpu, pages


def draw(rows, dtype):
    """q, k, v, forget gate, beta and output gate of one token per row, as the projections give them."""
    wide = [torch.randn(rows, CHANNELS, dtype=dtype) for _ in range(5)]
    return [*wide[:4], torch.randn(rows, HEADS, dtype=dtype), wide[4]]


def decoding(slots, tokens=None):
    """Metadata of a step of decoding alone; the indices are a column of a table, as without a graph of whole steps."""
    table = torch.tensor([slots, [77] * len(slots)], dtype=torch.int32).T.contiguous()
    tokens = len(slots) if tokens is None else tokens
    return SimpleNamespace(
        num_prefills=0,
        num_decodes=tokens,
        num_spec_decodes=0,
        num_actual_tokens=tokens,
        spec_sequence_masks=None,
        non_spec_state_indices_tensor=table[:, 0],
        non_spec_query_start_loc=torch.arange(len(slots) + 1, dtype=torch.int32),
        has_initial_state=None,
    )


class Context:
    """What both layers' modules find in place of vLLM's forward context and its layout of the caches."""

    def __init__(self, patch, dim_first):
        self.metadata = None
        for module in (kda, kda_card):
            patch(module, "get_forward_context", lambda: self)
            patch(module, "is_conv_state_dim_first", lambda: dim_first)

    @property
    def attn_metadata(self):
        return None if self.metadata is None else {NAME: self.metadata}


def run_card(context, card, inputs, metadata):
    """What the layer leaves for `o_proj`."""
    context.metadata = metadata
    gated = inputs[5].clone()
    card._forward(*inputs[:5], gated)
    return gated


def run_cpu(context, cpu, inputs, slots):
    context.metadata = decoding(slots)
    q, k, v, forget, beta, gate = (x[: len(slots)] for x in inputs)
    out = torch.empty(1, len(slots), HEADS, DIM, dtype=q.dtype)
    heads = (HEADS, DIM)
    cpu._forward(
        torch.cat([q, k, v], dim=-1),
        forget.unflatten(-1, heads).unsqueeze(0),
        gate.unflatten(-1, heads),
        beta.unsqueeze(0),
        out,
    )
    return out[0].flatten(1)


def compare_steps(patch, dtype, dim_first, **tolerance):
    """Steps of sequences that end and join, with either kind of padding: outputs and states of both layers agree."""
    context = Context(patch, dim_first)
    card, cpu, pages = make_layers(dtype, dim_first)
    before = pages.clone()
    # (slots of the sequences, rows of the graph, whether the metadata count the padding as a graph of whole steps does)
    steps = [
        ([5, 2, 7], 3, False),
        ([5, 2, 7], 4, True),
        ([5, 7], 4, True),
        ([7, 5, 3, 1, 8], 8, False),
        ([3], 1, True),
        ([3], 2, False),
    ]
    for slots, rows, whole in steps:
        inputs = draw(rows, dtype)
        padded = slots + [NULL_BLOCK_ID] * (rows - len(slots)) if whole else slots
        got = run_card(context, card, inputs, decoding(padded))
        assert not got[len(slots) :].any()
        torch.testing.assert_close(got[: len(slots)], run_cpu(context, cpu, inputs, slots), **tolerance)
        for ours, theirs in zip(card.kv_cache, cpu.kv_cache, strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)
    touched = sorted({slot for slots, _, _ in steps for slot in slots})
    assert (pages != before).any(dim=1).nonzero().flatten().tolist() == touched
    assert torch.equal(pages[:, -64:], before[:, -64:])
