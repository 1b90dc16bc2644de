"""Weights written straight into a model that fuses and derives as vLLM does, on stand-in modules."""

import pytest
import torch
from torch import nn

from kimi_rl.rollout.vllm_plugin.direct import SWITCH, DirectWrites
from kimi_rl.rollout.vllm_plugin.served import served_tensors

HEADS, NOPE, VALUE, RANK, HIDDEN = 2, 3, 4, 5, 6


def linear(rows, columns):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(rows, columns))
    return module


class StandIn(nn.Module):
    """A layer of each kind, with vLLM's names for fused projections and for what MLA derives from `kv_b_proj`."""

    def __init__(self):
        super().__init__()
        self.kda, self.mla, self.mlp = nn.Module(), nn.Module(), nn.Module()
        self.kda.in_proj_qkvgfab = linear(4 + 4 + 4 + 2 + 3, HIDDEN)
        self.kda.A_log = nn.Parameter(torch.randn(HEADS))
        self.mlp.gate_up_proj = linear(8 + 8, HIDDEN)
        self.mla.kv_b_proj = linear(HEADS * (NOPE + VALUE), RANK)
        self.mla.mla_attn = nn.Module()
        self.mla.mla_attn.W_UK_T = torch.zeros(HEADS, NOPE, RANK)
        self.mla.mla_attn.W_UV = torch.zeros(HEADS, RANK, VALUE)
        self.head = linear(12, HIDDEN)  # vLLM pads the vocabulary


SHAPES = {
    "kda.q_proj.weight": (4, HIDDEN), "kda.k_proj.weight": (4, HIDDEN), "kda.v_proj.weight": (4, HIDDEN),
    "kda.b_proj.weight": (2, HIDDEN), "kda.f_a_proj.weight": (3, HIDDEN), "kda.A_log": (1, 1, HEADS, 1),
    "mlp.gate_proj.weight": (8, HIDDEN), "mlp.up_proj.weight": (8, HIDDEN),
    "mla.kv_b_proj.weight": (HEADS * (NOPE + VALUE), RANK), "head.weight": (10, HIDDEN),
}  # fmt: skip
SHAPES = {name: torch.Size(shape) for name, shape in SHAPES.items()}


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")


def test_what_is_written_is_what_is_served():
    model = StandIn()
    places = [p.data_ptr() for p in model.parameters()]
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    weights["kda.A_log"] = weights["kda.A_log"].reshape(-1)  # as some checkpoints have it
    direct = DirectWrites.of(model, SHAPES)
    names = list(weights)
    for part in (names[:4], names[4:]):
        direct.write((name, weights[name]) for name in part)
    direct.finish()
    for name, served in served_tensors(model, SHAPES):
        assert torch.equal(served, weights[name].reshape(SHAPES[name])), name
    assert [p.data_ptr() for p in model.parameters()] == places, "graphs hold these addresses"


def test_what_was_derived_before_is_seen_until_it_is_derived_again():
    model = StandIn()
    direct = DirectWrites.of(model, SHAPES)
    direct.write([("mla.kv_b_proj.weight", torch.randn(SHAPES["mla.kv_b_proj.weight"]))])
    assert dict(served_tensors(model, SHAPES))["mla.kv_b_proj.weight"].isnan().all()
    direct.finish()
    assert not dict(served_tensors(model, SHAPES))["mla.kv_b_proj.weight"].isnan().any()


def test_other_layouts_and_the_switch_leave_it_to_vllm(monkeypatch):
    class Packed(StandIn):
        def __init__(self):
            super().__init__()
            self.mlp.gate_up_proj.cpu_linear = True
            self.mlp.gate_up_proj.input_size = HIDDEN
            self.mlp.gate_up_proj.quant_method = self

        def apply(self, module, rows):
            return rows @ module.weight.T

    assert DirectWrites.of(Packed(), SHAPES) is None
    monkeypatch.delenv(SWITCH)
    assert DirectWrites.of(StandIn(), SHAPES) is None
