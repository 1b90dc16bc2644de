"""The KDA layer for vLLM on a card: its decoding beside our CPU layer's, and when it leaves a step to vLLM."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from card_layers import CHANNELS, DIM, HEADS, Context, compare_steps, decoding, draw, make_layers, run_card
from triton_interpreter import interpreted
from vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn import KimiGatedDeltaNetAttention

from kimi_rl.kernels.kda_decode.reference import kda_decode_reference
from kimi_rl.kernels.kda_gate.reference import kda_gate_reference
from kimi_rl.kernels.short_conv.reference import short_conv_reference
from kimi_rl.rollout import vllm_plugin
from kimi_rl.rollout.vllm_plugin import KDA_STEP, kda_card

TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


@pytest.fixture(params=[True, False], ids=["dim first", "time first"])
def dim_first(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decodes_as_the_layer_for_a_cpu(monkeypatch, dtype, dim_first):
    compare_steps(monkeypatch.setattr, dtype, dim_first, **TOLERANCE[dtype])


def test_with_the_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    code = """
        import torch
        from card_layers import compare_steps
        from kimi_rl.kernels.kda_step.triton_step import kda_step_triton
        from kimi_rl.rollout.vllm_plugin import kda_card
        torch.manual_seed(0)
        calls = []
        kda_card.kda_step = lambda *args, **options: calls.append(1) or kda_step_triton(*args, **options)
        with torch.no_grad():
            for dim_first in (True, False):
                compare_steps(setattr, torch.float32, dim_first, rtol=1e-4, atol=1e-5)
                compare_steps(setattr, torch.bfloat16, dim_first, rtol=3e-2, atol=3e-2)
        assert len(calls) == 24
        print("checked")
    """
    assert interpreted(code).strip().endswith("checked")


class Own:
    """Stands for vLLM 0.26's `_forward` in steps of decoding: notes its arguments, fills core_attn_out [1, T, H, D]."""

    def __init__(self, monkeypatch, context):
        self.context, self.calls = context, []
        monkeypatch.setattr(KimiGatedDeltaNetAttention, "_forward", lambda layer, **values: self(layer, **values))

    def __call__(self, layer, q_proj_states, k_proj_states, v_proj_states, g1, beta, core_attn_out):
        rows = len(q_proj_states)
        assert g1.shape == core_attn_out.shape == (1, rows, HEADS, DIM)
        assert beta.shape == (1, rows, HEADS) and beta.dtype == torch.float32
        assert not core_attn_out.any() and core_attn_out.is_contiguous()
        self.calls.append(rows)
        metadata = self.context.metadata
        now, slots = slice(metadata.num_actual_tokens), metadata.non_spec_state_indices_tensor.long()
        conv_state, state = layer._states()
        taps = torch.cat([conv.weight for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)]).squeeze(1)
        new = torch.cat([q_proj_states, k_proj_states, v_proj_states], dim=-1)[now].unsqueeze(1)
        mixed, tail = short_conv_reference(new, taps, initial_state=conv_state[slots], output_final_state=True)
        q, k, v = (x.unflatten(-1, (HEADS, DIM)) for x in mixed.squeeze(1).split(CHANNELS, dim=-1))
        g = kda_gate_reference(g1[0, now].flatten(1), layer.A_log, layer.dt_bias)
        o, after = kda_decode_reference(q, k, v, g, beta[0, now], state[slots].transpose(-1, -2))
        conv_state[slots], state[slots] = tail, after.transpose(-1, -2)
        core_attn_out[0, now] = o


@pytest.mark.parametrize(
    ("change", "metadata"),
    [
        ({}, {"num_prefills": 1}),
        ({}, {"num_spec_decodes": 1}),
        ({"gate_lower_bound": -5.0}, {}),
        ({"conv_size": 3}, {}),
    ],
)
@torch.no_grad()
def test_what_it_leaves_to_vllm_comes_out_the_same(monkeypatch, dim_first, change, metadata):
    context = Context(monkeypatch.setattr, dim_first)
    card, _, pages = make_layers(torch.float32, dim_first)
    own, before, inputs = Own(monkeypatch, context), pages.clone(), draw(6, torch.float32)
    slots = [4, 1, 6, 2]
    here = run_card(context, card, inputs, decoding(slots))
    states = [x.clone() for x in card.kv_cache]
    assert not own.calls
    pages.copy_(before)
    for name, value in change.items():
        monkeypatch.setattr(card, name, value, raising=False)
    step = decoding(slots)
    for name, value in metadata.items():
        setattr(step, name, value)
    there = run_card(context, card, inputs, step)
    assert own.calls == [6] and there[:4].any() and not there[4:].any()
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
    for one, other in zip(card.kv_cache, states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_profiling_run_and_a_graph_of_another_layer(monkeypatch):
    context = Context(monkeypatch.setattr, True)
    card, _, pages = make_layers(torch.float32, True)
    before = pages.clone()
    assert not run_card(context, card, draw(4, torch.float32), None).any() and torch.equal(pages, before)
    inputs = draw(4, torch.float32)
    with pytest.raises(RuntimeError, match=f"{KDA_STEP}: this graph was compiled for vLLM's own KDA layer"):
        card._forward(*inputs[:5], inputs[5].view(1, 4, HEADS, DIM))


def test_forward_hands_raw_gates_to_the_op_and_its_result_to_the_output(monkeypatch):
    card, _, _ = make_layers(torch.float32, True)
    hidden, output, seen = torch.randn(3, 4), torch.empty(3, 5), []
    sizes = dict.fromkeys(("q_proj", "k_proj", "v_proj"), (4, CHANNELS))
    sizes |= dict.fromkeys(("f_a_proj", "g_a_proj"), (4, DIM))
    sizes |= dict.fromkeys(("f_b_proj", "g_b_proj"), (DIM, CHANNELS)) | {"b_proj": (4, HEADS), "o_proj": (CHANNELS, 5)}
    weights = {name: torch.randn(size) for name, size in sizes.items()}
    for name, weight in weights.items():
        object.__setattr__(card, name, lambda x, weight=weight: (x @ weight, None))

    def op(*args):
        seen.extend(x.clone() if isinstance(x, torch.Tensor) else x for x in args)
        args[5].fill_(2.0)

    monkeypatch.setattr(torch.ops, "vllm", SimpleNamespace(kda_attention=op))
    card.forward(hidden, None, output)
    direct = [hidden @ weights[name] for name in ("q_proj", "k_proj", "v_proj")]
    direct += [hidden @ weights["f_a_proj"] @ weights["f_b_proj"], hidden @ weights["b_proj"]]
    direct += [hidden @ weights["g_a_proj"] @ weights["g_b_proj"]]
    for got, expected in zip(seen[:6], direct, strict=True):
        assert torch.equal(got, expected)
    assert seen[6] == card.prefix
    torch.testing.assert_close(output, torch.full((3, CHANNELS), 2.0) @ weights["o_proj"])


@pytest.fixture
def model_card(monkeypatch):
    """The module over a stand-in for the model code of vLLM 0.26, which is not installed here."""
    stock = ModuleType("vllm.model_executor.models.kimi_linear")

    class KimiLinearForCausalLM:
        def __init__(self, *, vllm_config, prefix=""):
            self.layer = stock.KimiGatedDeltaNetAttention
            if vllm_config.fails:
                raise RuntimeError("out of memory")

    stock.KimiGatedDeltaNetAttention, stock.KimiLinearForCausalLM = "vLLM's", KimiLinearForCausalLM
    monkeypatch.setitem(sys.modules, stock.__name__, stock)
    monkeypatch.delitem(sys.modules, "kimi_rl.rollout.vllm_plugin.model_card", raising=False)
    module = importlib.import_module("kimi_rl.rollout.vllm_plugin.model_card")
    monkeypatch.setattr(module, "choose", lambda kernel, tensor, has_fla: "fla")
    yield module
    assert stock.KimiGatedDeltaNetAttention == "vLLM's"
    del sys.modules[module.__name__]


def test_the_switch_decides_when_a_model_is_built(monkeypatch, model_card):
    build = model_card.KimiLinearForCausalLM
    config = SimpleNamespace(additional_config={"a": 1}, fails=False)
    given = config.additional_config
    assert build(vllm_config=config).layer == "vLLM's" and config.additional_config == {"a": 1}
    monkeypatch.setenv(KDA_STEP, "1")
    assert build(vllm_config=config).layer is kda_card.CardKimiDeltaAttention
    assert config.additional_config == {"a": 1, "kimi_rl_kda_step": True} and given == {"a": 1}
    config.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        build(vllm_config=config)


def test_without_a_kernel_or_a_name_in_the_configuration_it_is_vllms(monkeypatch, model_card, caplog):
    monkeypatch.setenv(KDA_STEP, "1")
    config = SimpleNamespace(additional_config=object(), fails=False)
    assert model_card.KimiLinearForCausalLM(vllm_config=config).layer == "vLLM's"
    assert "additional_config is no dict" in caplog.text
    monkeypatch.undo()
    config.additional_config = {}
    monkeypatch.setenv(KDA_STEP, "1")
    assert not model_card._wanted(config) and "no kernel here" in caplog.text  # a tensor on a CPU


def test_register_names_the_model_where_vllm_has_its_own_at_the_same_place(monkeypatch, caplog):
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    known = ModelRegistry.models["KimiLinearForCausalLM"]
    vllm_plugin.register()
    monkeypatch.setenv(KDA_STEP, "1")
    monkeypatch.setattr(vllm_plugin, "_STOCK_MODEL", "vllm.model_executor.models.elsewhere")
    vllm_plugin.register()
    assert ModelRegistry.models["KimiLinearForCausalLM"] is known
    assert "this vLLM's KDA layer is built otherwise" in caplog.text
    monkeypatch.setattr(vllm_plugin, "_STOCK_MODEL", "vllm.model_executor.models.registry")
    vllm_plugin.register()
    found = ModelRegistry.models["KimiLinearForCausalLM"]
    assert (found.module_name, found.class_name) == (f"{vllm_plugin.__name__}.model_card", "KimiLinearForCausalLM")
