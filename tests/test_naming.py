import re

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.model.naming import layer_of, load_into, to_checkpoint
from kimi_rl.model.presets import build_config
from kimi_rl.recipe import ModelSection

VARIANTS = [(arch, mlp) for arch in ("hybrid", "mla") for mlp in ("dense", "moe")]


def make_model(arch="hybrid", mlp="moe", seed=0, **overrides):
    """A model in which every tensor, buffers included, is random and no two are equal."""
    section = ModelSection(arch=arch, mlp=mlp, overrides={"hidden_size": 32, "vocab_size": 40} | overrides)
    config = build_config(section, vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = KimiLinearForCausalLM(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    return model


@pytest.fixture(params=VARIANTS, ids=["-".join(v) for v in VARIANTS])
def variant(request):
    return request.param


def copies(model):
    return [(name, tensor.clone()) for name, tensor in to_checkpoint(model)]


def test_round_trip_of_every_tensor(variant):
    source, target = make_model(*variant, seed=1), make_model(*variant, seed=2)
    places = {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    assert not any(
        torch.equal(a, b)
        for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
    load_into(target, copies(source))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name
        assert target.state_dict()[name].data_ptr() == places[name], f"{name} was replaced, not filled"


def test_elements_are_neither_lost_nor_doubled(variant):
    model = make_model(*variant)
    assert sum(t.numel() for _, t in to_checkpoint(model)) == sum(
        t.numel() for t in model.state_dict().values()
    )


def test_agrees_with_transformers_own_conversion(variant):
    """Except where transformers is wrong: it renames the feed-forward of dense layers as if they were MoE."""
    model = make_model(*variant)
    dense = [i for i, kind in enumerate(model.config.mlp_layer_types) if kind == "dense"]
    theirs = {
        re.sub(rf"layers\.({'|'.join(map(str, dense))})\.block_sparse_moe\.", r"layers.\1.mlp.", name): tensor
        for name, tensor in revert_weight_conversion(model, model.state_dict()).items()
    }
    ours = dict(to_checkpoint(model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_published_names_and_shapes():
    """The layout of the released checkpoint, written down by hand."""
    model = make_model(num_local_experts=2, num_experts_per_tok=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in to_checkpoint(model)}
    D, P, HEADS, K, I, M = 32, 128, 4, 32, 384, 128
    attention = {
        "q_proj.weight": (P, D),
        "k_proj.weight": (P, D),
        "v_proj.weight": (P, D),
        "q_conv1d.weight": (P, 1, 4),
        "k_conv1d.weight": (P, 1, 4),
        "v_conv1d.weight": (P, 1, 4),
        "A_log": (1, 1, HEADS, 1),
        "dt_bias": (P,),
        "f_a_proj.weight": (K, D),
        "f_b_proj.weight": (P, K),
        "b_proj.weight": (HEADS, D),
        "g_a_proj.weight": (K, D),
        "g_b_proj.weight": (P, K),
        "o_norm.weight": (K,),
        "o_proj.weight": (D, P),
    }
    norms = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    dense = {"mlp.gate_proj.weight": (I, D), "mlp.up_proj.weight": (I, D), "mlp.down_proj.weight": (D, I)}
    moe = {"gate.weight": (2, D), "gate.e_score_correction_bias": (2,)}
    for expert in range(2):
        moe |= {f"experts.{expert}.w{n}.weight": (D, M) if n == 2 else (M, D) for n in (1, 2, 3)}
    moe |= {
        f"shared_experts.{n}_proj.weight": (D, M) if n == "down" else (M, D) for n in ("gate", "up", "down")
    }
    moe = {f"block_sparse_moe.{name}": shape for name, shape in moe.items()}
    kda = {f"self_attn.{name}": shape for name, shape in attention.items()}
    mla = {
        "self_attn.q_proj.weight": (4 * 48, D),
        "self_attn.kv_a_proj_with_mqa.weight": (64 + 16, D),
        "self_attn.kv_a_layernorm.weight": (64,),
        "self_attn.kv_b_proj.weight": (4 * 64, 64),
        "self_attn.o_proj.weight": (D, 4 * 32),
    }
    for index, expected in ((0, kda | norms | dense), (1, kda | norms | moe), (3, mla | norms | moe)):
        prefix = f"model.layers.{index}."
        assert {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)} == expected
    outside = {name: shape for name, shape in shapes.items() if ".layers." not in name}
    assert outside == {
        "model.embed_tokens.weight": (40, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (40, D),
    }


def test_fused_tensors_are_split_in_the_right_order():
    model = make_model()
    named = dict(to_checkpoint(model))
    layer = model.model.layers[1]
    conv, gate_up, down = (
        layer.self_attn.conv1d.weight,
        layer.mlp.experts.gate_up_proj,
        layer.mlp.experts.down_proj,
    )
    for part, letter in enumerate("qkv"):
        assert torch.equal(
            named[f"model.layers.1.self_attn.{letter}_conv1d.weight"], conv[128 * part :][:128]
        )
    expert = "model.layers.1.block_sparse_moe.experts.5."
    assert torch.equal(named[expert + "w1.weight"], gate_up[5, :128])
    assert torch.equal(named[expert + "w3.weight"], gate_up[5, 128:])
    assert torch.equal(named[expert + "w2.weight"], down[5])


def test_layers_are_adjacent_and_tensors_are_views(variant):
    model = make_model(*variant)
    groups = [layer_of(name) for name, _ in to_checkpoint(model)]
    changes = [a for a, b in zip(groups, [*groups[1:], None], strict=True) if a != b]
    assert changes == [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}" for i in range(4)),
        "model.norm.weight",
        "lm_head.weight",
    ]
    with torch.no_grad():
        for _, tensor in to_checkpoint(model):
            assert tensor.is_contiguous() and not tensor.requires_grad
            tensor.fill_(3.0)
    assert all(bool((t == 3).all()) for t in model.state_dict().values())


def test_tied_head_is_not_repeated():
    model = make_model(tie_word_embeddings=True)
    names = [name for name, _ in to_checkpoint(model)]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names


def test_dtypes_are_kept():
    target = make_model(seed=2).to(torch.bfloat16)
    before = {name: tensor.dtype for name, tensor in target.state_dict().items()}
    source = make_model(seed=1)
    load_into(target, copies(source))
    assert {name: tensor.dtype for name, tensor in target.state_dict().items()} == before
    gate = "model.layers.0.self_attn.forget_gate.A_log"
    assert torch.equal(target.state_dict()[gate], source.state_dict()[gate])


def test_flat_A_log_is_accepted():
    source, target = make_model(seed=1), make_model(seed=2)
    load_into(target, ((n, t.flatten() if n.endswith("A_log") else t) for n, t in copies(source)))
    assert all(
        torch.equal(a, b)
        for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def change(name, how):
    """A copy of a checkpoint's items with one item changed."""
    items = copies(make_model(seed=1))
    at = [n for n, _ in items].index(name)
    if how == "drop":
        del items[at]
    elif how == "repeat":
        items.insert(at, items[at])
    elif how == "apart":
        items.append(items.pop(at))
    elif how == "shape":
        items[at] = (name, items[at][1][:1])
    elif how == "rename":
        items[at] = (name + "_2", items[at][1])
    return items


@pytest.mark.parametrize(
    "how, message",
    [
        ("drop", "model.layers.2 is incomplete: 1 missing, first model.layers.2.self_attn.k_proj.weight"),
        ("repeat", "model.layers.2.self_attn.k_proj.weight came twice"),
        ("apart", "model.layers.2 is incomplete"),
        ("shape", r"k_proj.weight has shape \(1, 32\), the model needs \(128, 32\)"),
        ("rename", "model.layers.2.self_attn.k_proj.weight_2 is no tensor of this model"),
    ],
)
def test_bad_streams_are_refused_and_the_layer_is_untouched(how, message):
    model = make_model(seed=2)
    before = {name: tensor.clone() for name, tensor in model.model.layers[2].state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_into(model, change("model.layers.2.self_attn.k_proj.weight", how))
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.model.layers[2].state_dict().items()
    )


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_missing_part_is_refused(name):
    with pytest.raises(ValueError, match=f"1 parts never came, first {name}"):
        load_into(make_model(seed=2), change(name, "drop"))


def test_a_layer_sent_in_two_halves_is_refused():
    items = copies(make_model(seed=1))
    at = [n for n, _ in items].index("model.layers.2.self_attn.k_proj.weight")
    with pytest.raises(ValueError, match="model.layers.2 is incomplete"):
        load_into(make_model(seed=2), [*items[:at], *items[at + 1 :], items[at]])


def test_a_part_sent_twice_is_refused():
    items = copies(make_model(seed=1))
    with pytest.raises(ValueError, match="lm_head.weight came twice"):
        load_into(make_model(seed=2), [items[-1], *items])
