"""Whole conversions of tiny models: what is kept bit for bit, what both loaders make of the folder, what is refused."""

import dataclasses
import inspect
import json

import pytest
import torch
from tiny_sources import attention_inputs, make_source
from transformers.models.kimi_linear import modeling_kimi_linear as hf
from typer.testing import CliRunner

from kimi_rl.cli import app
from kimi_rl.convert.attention import read_attention, softmax_attention, source_heads
from kimi_rl.convert.conversion import VALUE_CHANNELS, Mixer, convert, target_config
from kimi_rl.errors import InputError
from kimi_rl.kernels.segments import Segments
from kimi_rl.model.load_save import load_model, load_tokenizer
from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.recipe import TokenizerSection
from kimi_rl.tokenizer import build_tokenizer

TEXT = torch.tensor([list(b"12 + 30 = 42, and nothing else is.")])


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """(source model, folder, report) of a Llama with tied embeddings, converted by the command."""
    folder = tmp_path_factory.mktemp("hybrid")
    source = make_source("llama", folder / "source")
    arguments = ["--out", str(folder / "out"), "--calibration-tokens", "2048", "--json"]
    done = CliRunner().invoke(app, ["convert", str(folder / "source"), *arguments])
    assert done.exit_code == 0, done.output
    return source, folder / "out", json.loads(done.stdout)


def test_all_but_attention_is_kept_bit_for_bit(hybrid):
    source, folder, _ = hybrid
    model = load_model(folder)
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, source.model.embed_tokens.weight)
    theirs = dict(source.named_parameters())
    kept = [name for name, _ in model.named_parameters() if "self_attn" not in name and name != "lm_head.weight"]
    assert len(kept) == 4 * 5 + 2
    for name in kept:
        assert torch.equal(model.get_parameter(name), theirs[name]), name
    assert model.config.rms_norm_eps == source.config.rms_norm_eps
    assert model.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (259, 259)


def test_plain_transformers_and_ours_load_the_same_model(hybrid, monkeypatch):
    _, folder, _ = hybrid
    for name in ("chunk_kimi_delta_attention", "causal_conv1d_fn"):  # fla, where installed, has no CPU
        monkeypatch.setattr(hf, name, inspect.unwrap(getattr(hf, name)))
    ours, plain = load_model(folder), hf.KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(TEXT).logits, plain(TEXT).logits, atol=1e-5, rtol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["first_k_dense_replace"] == 4  # what vLLM goes by
    assert config["max_position_embeddings"] == 2048


def test_report_says_what_was_lost(hybrid):
    source, folder, report = hybrid
    assert json.loads((folder / "convert.json").read_text()) == report
    assert [row["kind"] for row in report["layers"]] == ["kda", "kda", "kda", "mla"]
    for row in report["layers"]:
        assert 0 < row["error"] < 1
        assert row["error_copied"] > 0
    assert report["perplexity"]["source"] > 1 and report["perplexity"]["converted"] > 1
    assert report["parameters"]["source"] == sum(p.numel() for p in source.parameters())
    assert report["parameters"]["converted"] == sum(p.numel() for p in load_model(folder).parameters())
    assert report["chat_template_marked"] is True
    tokens = report["calibration_tokens"]
    assert tokens["fitted"] > tokens["measured"] > 0
    assert load_tokenizer(folder).decode(load_tokenizer(folder)("a<|im_end|>")["input_ids"]) == "a<|im_end|>"


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_becomes_all_mla(family, tmp_path):
    make_source(family, tmp_path / "source")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} times {i} is {i * i}. " * 8}) + "\n" for i in range(12)))
    report = convert(
        str(tmp_path / "source"), tmp_path / "out", arch="mla", calibration=str(texts), tokens=2000, rank=48
    )
    model = load_model(tmp_path / "out")
    assert model.config.layer_types == ["full_attention"] * 4
    assert model.config.kv_lora_rank == 48
    assert all(row["error"] < 1 for row in report["layers"])
    assert all(row["rank_lost"] >= 0 for row in report["layers"])


@pytest.mark.parametrize("spare", [0, 24])
def test_attention_without_rotation_becomes_itself(spare, monkeypatch):
    """Where nothing is dropped nothing is lost: no rotary embedding, and a latent as wide as the model; nor where heads
    have more channels for values than the source."""
    model = make_source("llama")
    size = read_attention(model, 1).head_dim
    monkeypatch.setitem(VALUE_CHANNELS, size, size + spare)
    x, _ = attention_inputs(model, 60)
    source = dataclasses.replace(read_attention(model, 1), frequencies=None)
    config = target_config(model.config, build_tokenizer(TokenizerSection(kind="bytes")), 0, 64)
    module = KimiLinearForCausalLM(config).eval().requires_grad_(False).model.layers[1].self_attn
    q, k, v = source_heads(source, x)
    _, o = softmax_attention(q, k, v, source.scale)
    wanted = torch.einsum("thv,dhv->td", o, source.out.float())
    assert module.o_proj.in_features == source.heads * (size + spare)
    found = Mixer(source, module, x, wanted, Segments([0, 40, 60]), 40).to_mla()
    if spare:  # silent at first, but what they would write is not nothing: they learn
        more = module.o_proj.weight.view(len(source.out), source.heads, -1)[..., size:]
        assert more.abs().amin((0, 2)).gt(0).all()
    torch.testing.assert_close(module(x[None], attention_mask=None)[0][0], wanted, atol=2e-4, rtol=2e-4)
    assert found["latent_size_spread"] < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "gru"}, "--arch: found 'gru'"),
        ({"ratio": "3"}, "--ratio: found '3'"),
        ({"arch": "mla", "ratio": "3:1"}, "has no KDA layers"),
        ({"rank": 65}, "--kv-lora-rank: found 65; use 1 to the model's width, 64"),
        ({"calibration": "no/such.jsonl"}, "no/such.jsonl: no such file"),
    ],
)
def test_bad_arguments(hybrid, tmp_path, arguments, message):
    source = hybrid[1].parent / "source"
    with pytest.raises(InputError, match=message) as raised:
        convert(str(source), tmp_path / "out", **arguments)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_bad_sources_and_folders(hybrid, tmp_path):
    source, out, _ = hybrid
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        convert(str(out.parent / "source"), out)
    with pytest.raises(InputError, match="model_type 'kimi_linear'"):
        convert(str(out), tmp_path / "out")
    make_source("llama", tmp_path / "gelu", hidden_act="gelu")
    with pytest.raises(InputError, match="'gelu'"):
        convert(str(tmp_path / "gelu"), tmp_path / "out")
    make_source("llama", tmp_path / "bias", mlp_bias=True)
    with pytest.raises(InputError, match="biases"):
        convert(str(tmp_path / "bias"), tmp_path / "out")
