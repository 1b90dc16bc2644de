import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import KimiLinearConfig

from kimi_rl.errors import InputError
from kimi_rl.kernels.kda_step import kda_step
from kimi_rl.model import load_save, modeling
from kimi_rl.model.load_save import create_model, load_model, load_tokenizer, save_model
from kimi_rl.model.modeling import FUSED_DECODE, KimiLinearForCausalLM
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.model.presets import SIZES, build_config, describe, hybrid_pattern
from kimi_rl.recipe import ModelSection

ROOT = Path(__file__).parents[1]
VOCABULARY = 64
VARIANTS = [(arch, mlp) for arch in ("hybrid", "mla") for mlp in ("dense", "moe")]
# Large random weights: with the usual 0.02 a token hardly sees its context, and a leak would hardly show.
# (They also amplify rounding: two correct forms differ by up to 2e-5 here, against leaks above 1.)
LOUD = {
    "initializer_range": 0.1,
    "hidden_size": 32,
    "linear_head_dim": 8,
    "intermediate_size": 48,
    "kv_lora_rank": 16,
}


def config(arch="hybrid", mlp="dense", **overrides):
    section = ModelSection(arch=arch, mlp=mlp, size="tiny", overrides=LOUD | overrides)
    return build_config(section, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def make_model(arch="hybrid", mlp="dense", seed=0, **overrides):
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM(config(arch, mlp, **overrides))
    with torch.no_grad():  # a router bias that matters: it starts at zero
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model.eval()


def tokens(*shape):
    return torch.randint(3, VOCABULARY, shape)


@pytest.fixture(scope="module", params=VARIANTS, ids=["-".join(v) for v in VARIANTS])
def model(request):
    return make_model(*request.param)


# One model, many ways to feed it --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("std, tolerance", [(0.1, 1e-4), (0.02, 1e-5)])
@pytest.mark.parametrize("arch, mlp", VARIANTS)
def test_prefill_and_decoding_equal_the_full_forward(arch, mlp, std, tolerance):
    model, ids = make_model(arch, mlp, initializer_range=std), tokens(2, 90)
    full = model(ids, use_cache=False).logits
    cache, pieces = None, []
    # Prefill, decode twice, several tokens at once, decode, several again.
    for part in ids.split([60, 1, 1, 20, 1, 7], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=tolerance)


@torch.no_grad()
def test_decoding_in_one_kernel_equals_the_full_forward(monkeypatch):
    model, ids = make_model(), tokens(2, 40)
    full = model(ids, use_cache=False).logits
    monkeypatch.setenv(FUSED_DECODE, "1")
    fused = []
    monkeypatch.setattr(modeling, "kda_step", lambda *args, **kwargs: fused.append(1) or kda_step(*args, **kwargs))
    cache, pieces = None, []
    for part in ids.split([30, 1, 1, 5, 1, 2], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=1e-4)
    assert len(fused) == 3 * model.config.layer_types.count("linear_attention")


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    rows = [tokens(n) for n in (40, 23, 1)]
    ids = torch.zeros(3, 40, dtype=torch.long)
    mask = torch.zeros(3, 40, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(40 - len(row), 40) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            logits[i, mask[i].bool()], model(row[None]).logits[0], rtol=1e-5, atol=1e-4
        )


@torch.no_grad()
def test_greedy_generation_in_a_padded_batch(model):
    rows = [tokens(n) for n in (12, 5)]
    ids, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 12 - len(row) :], mask[i, 12 - len(row) :] = row, 1
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    batch = model.generate(ids, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        sequence = row[None]
        for _ in range(8):  # greedy by full forwards; eos is suppressed by min_new_tokens
            logits = model(sequence).logits[0, -1]
            logits[2] = -torch.inf
            sequence = torch.cat([sequence, logits.argmax()[None, None]], dim=1)
        assert batch[i, 12:].tolist() == sequence[0, len(row) :].tolist()


def packed_difference(model) -> float:
    """Largest difference between sequences packed into one row and the same sequences alone."""
    lengths = [33, 1, 20, 70]
    sequences = [tokens(n) for n in lengths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        packed = model(torch.cat(sequences)[None], cu_seqlens=cu_seqlens).logits[0]
        alone = torch.cat([model(s[None]).logits[0] for s in sequences])
    return float((packed - alone).abs().max())


def test_packing_equals_separate_sequences(model):
    assert packed_difference(model) < 1e-4


@pytest.mark.parametrize("part", ["kda_chunk", "short_conv", "LatentAttention"])
def test_a_leak_in_any_part_is_seen(monkeypatch, part):
    model = make_model()
    if part == "LatentAttention":
        plain = modeling.hf.KimiLinearAttention.forward

        def without_borders(self, hidden_states, attention_mask, segments=None, **kwargs):
            length = hidden_states.shape[1]
            causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            return plain(self, hidden_states, causal, **kwargs)

        monkeypatch.setattr(modeling.LatentAttention, "forward", without_borders)
    else:
        kernel = getattr(modeling, part)
        monkeypatch.setattr(modeling, part, lambda *a, cu_seqlens=None, **kw: kernel(*a, **kw))
    assert packed_difference(model) > 0.1


def test_packed_gradients_equal_padded_gradients(model):
    rows = [tokens(n) for n in (30, 17)]
    loss = sum(model(row[None]).logits.log_softmax(-1)[..., 3].sum() for row in rows)
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    packed = model(torch.cat(rows)[None], cu_seqlens=torch.tensor([0, 30, 47])).logits
    got = torch.autograd.grad(
        packed.log_softmax(-1)[..., 3].sum(), list(model.parameters()), allow_unused=True
    )
    for (name, _), a, b in zip(model.named_parameters(), got, expected, strict=True):
        if a is None or b is None:
            assert a is b, name  # an expert no token chose
        else:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-6, msg=name)


def test_flash_attention_spelling_of_packing():
    model, ids, borders = make_model(), tokens(1, 20), torch.tensor([0, 8, 20], dtype=torch.int32)
    with torch.no_grad():
        expected = model(ids, cu_seqlens=borders).logits
        got = model(
            ids,
            position_ids=torch.cat([torch.arange(8), torch.arange(12)])[None],
            cu_seq_lens_q=borders,
            cu_seq_lens_k=borders,
            max_length_q=12,
            max_length_k=12,
        ).logits
    assert torch.equal(got, expected)


def test_packing_that_would_mix_sequences_is_refused():
    model, ids = make_model(), tokens(1, 10)
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]))
    with pytest.raises(ValueError, match="cache"):
        model(ids, cu_seqlens=torch.tensor([0, 4, 10]), use_cache=True)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, cu_seqlens=torch.tensor([0, 4, 10]), attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="0 to the packed length 10"):
        model(ids, cu_seqlens=torch.tensor([0, 4, 9]))


# Training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", ["dense", "moe"])
@pytest.mark.parametrize("arch", ["hybrid", "mla"])
def test_loss_of_a_fixed_batch_falls(arch, mlp):
    model = make_model(arch, mlp, initializer_range=0.05).train()
    ids = tokens(2, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses[:: len(losses) - 1]


def test_every_parameter_gets_a_gradient():
    model = make_model(mlp="moe").train()
    model(ids := tokens(8, 64), labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]


def test_gradient_is_finite_at_a_large_gate_bias():
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.fill_(100.0)
    model(ids := tokens(2, 20), labels=ids).loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = make_model().train(), tokens(2, 20)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        gradients.append(torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_no_cache_is_built_while_training():
    model, ids = make_model(), tokens(1, 5)
    assert model(ids).past_key_values is None
    with torch.no_grad():
        assert model(ids).past_key_values is not None


# Precision ------------------------------------------------------------------------------------------------


def kept(model):
    return {
        name: t.dtype
        for name, t in [*model.named_parameters(), *model.named_buffers()]
        if t.dtype == torch.float32
    }


@pytest.mark.parametrize("how", ["load", "to", "bfloat16", "half"])
def test_sensitive_tensors_stay_float32(tmp_path, how):
    model = make_model(mlp="moe")
    before = {name: t.clone() for name, t in modeling.fp32_tensors(model)}
    if how == "load":
        save_model(model, None, tmp_path / "m")
        cast = load_model(tmp_path / "m", dtype=torch.bfloat16)
    else:
        cast = model.to(torch.bfloat16) if how == "to" else getattr(model, how)()
    expected = {
        f"model.layers.{i}.self_attn.{name}"
        for i in range(3)
        for name in ("conv1d.weight", "forget_gate.A_log", "forget_gate.dt_bias")
    } | {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(1, 4)}
    assert set(kept(cast)) == expected
    for name, tensor in modeling.fp32_tensors(cast):
        assert torch.equal(tensor, before[name]), f"{name} went through the narrow dtype"


def test_bfloat16_and_autocast_stay_near_float32():
    model, ids = make_model(initializer_range=0.05), tokens(2, 40)
    with torch.no_grad():
        exact = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = model(ids).logits.float()
        narrow = model.to(torch.bfloat16)(ids).logits.float()
    scale = float(exact.abs().max())
    assert float((autocast - exact).abs().max()) < 0.05 * scale
    assert float((narrow - exact).abs().max()) < 0.05 * scale


@pytest.mark.parametrize("arch", ["hybrid", "mla"])
def test_under_autocast_log_probs_are_those_of_the_weights_that_the_engine_holds(arch):
    """What the engine rounds off must make no difference to the learner either, in any tensor."""
    model, ids = make_model(arch, initializer_range=0.05), tokens(1, 40)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    places, scored = torch.arange(39), ids[0, 1:]

    def score():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return model(
                ids, cu_seqlens=torch.tensor([0, 40]), scored_places=places, scored_tokens=scored, with_entropy=False
            ).logps

    found = score()
    kept = {name for name, _ in modeling.fp32_tensors(model)}
    for name, parameter in model.named_parameters():
        if name not in kept:
            parameter.data = parameter.data.bfloat16().float()
    torch.testing.assert_close(score(), found, rtol=0, atol=0)


# Presets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", ["dense", "moe"])
@pytest.mark.parametrize("size", SIZES)
def test_hybrid_and_mla_have_the_same_size(size, mlp):
    totals = {}
    for arch in ("hybrid", "mla"):
        section = ModelSection(size=size, arch=arch, mlp=mlp)
        counts = describe(
            build_config(section, vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        )
        parts = ("embedding", "kda", "mla", "mlp", "moe", "norm")
        assert counts["total"] == sum(counts[part] for part in parts)
        assert (counts["kda"] > 0) == (arch == "hybrid") and (counts["moe"] > 0) == (mlp == "moe")
        totals[arch] = counts["total"]
    assert abs(totals["mla"] / totals["hybrid"] - 1) < 0.02


def test_describe_counts_a_real_model():
    model = make_model(mlp="moe")
    counts = describe(model.config)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert counts["active"] == counts["total"] - experts * 6 // 8  # 2 of 8 experts


def test_layer_patterns():
    assert hybrid_pattern(8) == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert hybrid_pattern(6)[-2:] == ["linear_attention", "full_attention"]
    pattern = ["full_attention", "linear_attention"]
    section = ModelSection(layer_types=pattern)
    built = build_config(section, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    assert (built.layer_types, built.num_hidden_layers) == (pattern, 2)
    assert built.linear_attn_config["kda_layers"] == [2]
    with torch.no_grad():
        assert KimiLinearForCausalLM(built)(tokens(1, 5)).logits.shape == (1, 5, 64)


def test_overrides_reach_the_config():
    assert config(num_experts=4).num_local_experts == config(num_local_experts=4).num_experts == 4
    built = config(linear_head_dim=16, first_k_dense_replace=2, mlp="moe")
    assert built.linear_attn_config["head_dim"] == 16
    assert built.mlp_layer_types == ["dense", "dense", "sparse", "sparse"]
    assert built.first_k_dense_replace == 2


@pytest.mark.parametrize(
    "section, message",
    [
        ({"size": "huge"}, "model.size: found 'huge'; use one of tiny, small, base, large"),
        ({"overrides": {"hiden_size": 64}}, "model.overrides.hiden_size: .*did you mean 'hidden_size'"),
        ({"overrides": {"hidden_size": "wide"}}, "hidden_size"),
        ({"overrides": {"num_hidden_layers": 0}}, "num_hidden_layers: found 0"),
        ({"overrides": {"layer_types": []}}, "set model.layer_types instead"),
        (
            {"layer_types": ["full_attention"], "overrides": {"num_hidden_layers": 3}},
            "model.layer_types: found 1",
        ),
    ],
)
def test_bad_sections_are_named(section, message):
    with pytest.raises(InputError, match=message) as caught:
        build_config(ModelSection(**section), vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    assert "\n" not in str(caught.value)


# Folders --------------------------------------------------------------------------------------------------


class Tokenizer:
    """As much of a tokenizer as `create_model` reads."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self):
        return VOCABULARY


def test_created_models_depend_on_the_seed_alone():
    section = ModelSection(overrides=LOUD)
    torch.manual_seed(1)
    a = dict(to_checkpoint(create_model(section, Tokenizer(), seed=5)))
    torch.manual_seed(2)
    undisturbed = torch.rand(1)
    torch.manual_seed(2)
    b = dict(to_checkpoint(create_model(section, Tokenizer(), seed=5)))
    assert torch.equal(torch.rand(1), undisturbed)
    c = dict(to_checkpoint(create_model(section, Tokenizer(), seed=6)))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_save_and_load(model, tmp_path, monkeypatch):
    ids = tokens(2, 10)
    for shard_bytes in (load_save.SHARD_BYTES, 20_000):
        monkeypatch.setattr(load_save, "SHARD_BYTES", shard_bytes)
        folder = save_model(model, None, tmp_path / "model")
        loaded = load_model(folder)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert [n for n, _ in to_checkpoint(loaded)] == [n for n, _ in to_checkpoint(model)]
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_config_is_what_vllm_reads(tmp_path):
    vllm_config = pytest.importorskip("vllm.transformers_utils.configs.kimi_linear")
    for arch, mlp in VARIANTS:
        model = make_model(arch, mlp)
        raw = json.loads((save_model(model, None, tmp_path / "m") / "config.json").read_text())
        assert raw["architectures"] == ["KimiLinearForCausalLM"] and raw["model_type"] == "kimi_linear"
        read = vllm_config.KimiLinearConfig(**raw)
        kinds = ["linear_attention" if read.is_kda_layer(i) else "full_attention" for i in range(4)]
        assert kinds == model.config.layer_types
        assert read.is_moe and read.first_k_dense_replace == (4 if mlp == "dense" else 1)
        assert read.is_mla and read.mla_use_nope and read.max_position_embeddings == 4096
        assert (read.num_experts, read.num_experts_per_token, read.num_shared_experts) == (8, 2, 1)
        assert read.rms_norm_eps == model.config.rms_norm_eps == 1e-5


def test_plain_transformers_reads_the_folders(tmp_path):
    """Equal logits from transformers' own class, in a process where fla cannot be imported."""
    ids = tokens(2, 70)
    expected = {}
    for arch, mlp in VARIANTS:
        model = make_model(arch, mlp)
        save_model(model, None, tmp_path / f"{arch}-{mlp}")
        with torch.no_grad():
            expected[f"{arch}-{mlp}"] = model(ids).logits
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    code = """
        import sys
        from pathlib import Path
        sys.modules["fla"] = sys.modules["causal_conv1d"] = None
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM
        root = Path(sys.argv[1])
        ids, out = load_file(root / "ids.safetensors")["ids"], {}
        for folder in sorted(p for p in root.iterdir() if p.is_dir()):
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert type(model).__module__ == "transformers.models.kimi_linear.modeling_kimi_linear"
            assert not any(info.values()), info
            with torch.no_grad():
                out[folder.name] = model(ids, use_cache=False).logits
        save_file(out, root / "logits.safetensors")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for name, logits in load_file(tmp_path / "logits.safetensors").items():
        torch.testing.assert_close(logits, expected.pop(name), rtol=1e-5, atol=1e-4)
    assert not expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a card FLA's kernels are wanted")
def test_without_a_card_fla_is_not_imported_and_transformers_own_class_works(tmp_path):
    pytest.importorskip("fla")
    save_model(make_model(), None, tmp_path / "model")
    code = """
        import sys
        import kimi_rl.model.load_save
        assert not [name for name in sys.modules if name.split(".")[0] == "fla"]
        import torch
        import transformers
        model = transformers.KimiLinearForCausalLM.from_pretrained(sys.argv[1])
        assert type(model).__module__.startswith("transformers.")
        print(model(torch.tensor([[5, 6, 7]])).logits.sum().item())
        import fla.ops.kda  # whoever wants it finds it
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "model")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    expected = make_model()(torch.tensor([[5, 6, 7]])).logits.sum().item()
    assert float(run.stdout) == pytest.approx(expected, abs=1e-3)


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = save_model(make_model(), None, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(load_save, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(make_model(seed=1), None, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        load_model(tmp_path / "absent")
    with pytest.raises(InputError, match="no tokenizer_config.json"):
        load_tokenizer(tmp_path)

    folder = save_model(make_model(), None, tmp_path / "model")
    good = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"linear_attn_config": good["linear_attn_config"] | {"gate_lower_bound": -5.0}}, "gate_lower_bound"),
    ]:
        (folder / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=message):
            load_model(folder)
    (folder / "config.json").write_text(json.dumps(good))

    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.1.self_attn.o_proj.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing keys, first model.layers.1.self_attn.o_proj.weight"):
        load_model(folder)
    save_file(
        weights | {"model.layers.1.self_attn.o_proj.weight": lost[:1].clone()}, folder / "model.safetensors"
    )
    with pytest.raises(InputError, match="o_proj"):
        load_model(folder)


def test_explicit_layer_types_beat_transformers_default():
    """transformers would make a four-layer model all linear, and its cache would then fail."""
    assert KimiLinearConfig(num_hidden_layers=4).layer_types == ["linear_attention"] * 4
    assert config().layer_types.count("full_attention") == 1
