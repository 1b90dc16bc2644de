"""`kimi-rl bench decode` on tiny models: shapes, floors by hand, and what it refuses."""

import json

import pytest
import torch
from runs import run, run_inside
from triton_interpreter import interpreted

from kimi_rl.bench import decode
from kimi_rl.bench.decode import bench_decode, load_longest, memory_floor, parse_models, timed_folder
from kimi_rl.bench.decode_op import LayerInputs
from kimi_rl.compare.panels import decode_panels
from kimi_rl.errors import InputError, RunError
from kimi_rl.model.presets import build_config, describe
from kimi_rl.recipe import ModelSection


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_two_arms(tiny_models, engine, monkeypatch):
    if engine == "vllm":
        pytest.importorskip("vllm")
    monkeypatch.setitem(decode._COPY_BYTES, "cpu", 2**20)
    arms = {arch: str(tiny_models[arch, "dense"]) for arch in ("hybrid", "mla")}
    found = bench_decode(arms, context=[24, 12], tokens=12, repeats=3, batch=2, engine=engine)
    assert found["engine"] == engine and [model["name"] for model in found["models"]] == ["hybrid", "mla"]
    for model in found["models"]:
        assert [row["context"] for row in model["rows"]] == [12, 24]
        for row in model["rows"]:
            assert row["prefill_s"] == min(row["one_token_s"]) > 0 and len(row["all_tokens_s"]) == 3
            assert row["token_s"] == pytest.approx((min(row["all_tokens_s"]) - min(row["lead_tokens_s"])) / 12)
            moved = row["weight_bytes"] + row["kv_bytes"] + row["state_bytes"]
            assert row["floor_s"] == pytest.approx(moved / found["copy_bytes_per_s"])
    json.dumps(found)
    panels = decode_panels(found)
    assert [panel.title for panel in panels] == ["Prefill", "Time per output token"]
    assert [line.arm for line in panels[1].lines] == ["hybrid", "hybrid: memory floor", "mla", "mla: memory floor"]


@pytest.mark.parametrize("batch", [1, 4])
def test_steps_that_also_read_prompts_are_not_time_per_token(batch, monkeypatch):
    """An engine that reads a prompt a step; sequences decode meanwhile, and such a mixed step takes 7 s more."""

    def seconds(engine, requests, tokens):
        count = len(requests)
        mixed = min(count, tokens) - 1 if count > 1 else 0
        return 10.0 * count + 7.0 * mixed + 0.5 * (tokens - 1)

    monkeypatch.setattr(decode, "_time", seconds)
    config = build_config(ModelSection(), vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    row = decode._row(None, config, "vllm", "cpu", 1e9, 64, 8, 2, batch, 0)
    assert row["prefill_s"] == 10.0 * batch and row["token_s"] == pytest.approx(0.5)
    assert (row["lead_tokens_s"] == row["one_token_s"]) == (batch == 1)


def test_floor_by_hand():
    hybrid, mla = (
        build_config(ModelSection(arch=arch), vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=3)
        for arch in ("hybrid", "mla")
    )
    found = memory_floor(mla, 1000, 3, bfloat16=True)
    assert found["weight_bytes"] == 2 * (describe(mla)["total"] - 512 * 128)
    assert found["kv_bytes"] == 3 * 4 * 1000 * 80 * 2 and found["state_bytes"] == 0
    assert memory_floor(hybrid, 1000, 3, bfloat16=True)["kv_bytes"] * 4 == found["kv_bytes"]
    # The state is read and written, in float32 whatever the rest is.
    assert memory_floor(hybrid, 9, 1, bfloat16=False)["state_bytes"] == 2 * 3 * (4 * 32 * 32 * 4 + 3 * 3 * 128 * 4)


def test_nothing_stops_a_timing_and_the_model_stays_as_it_is(tiny_models):
    folder = tiny_models["hybrid", "dense"]
    before = (folder / "config.json").read_text()
    with timed_folder(str(folder), 10**6) as timed:
        config = json.loads((timed / "config.json").read_text())
        assert config["eos_token_id"] == [] and not (timed / "generation_config.json").exists()
        assert max(config.get(k, 0) for k in ("max_position_embeddings", "model_max_length")) == 10**6
        assert (timed / "model.safetensors").resolve() == (folder / "model.safetensors").resolve()
    assert (folder / "config.json").read_text() == before


def test_contexts_that_do_not_fit_are_rows_with_an_error():
    def make(max_model_len):
        if max_model_len > 25:
            raise ValueError(f"no room\nfor {max_model_len}")
        return max_model_len

    engine, fitting, refused = load_longest(make, [10, 20, 30, 40], 5)
    assert engine == 25 and fitting == [10, 20]
    assert refused == [{"context": 30, "error": "no room for 35"}, {"context": 40, "error": "no room for 45"}]
    with pytest.raises(RunError, match="even at 30 tokens: no room"):
        load_longest(make, [30, 40], 5)


def test_models_of_the_command_line(tiny_models, tmp_path):
    folder = str(tiny_models["mla", "dense"])
    assert parse_models([folder, "h=hybrid:tiny"]) == {folder: folder, "h": "hybrid:tiny"}
    for sources, word in (([str(tmp_path)], "config.json"), (["hybrid:huge"], "ARCH:SIZE"),
                          (["mla:tiny", "mla:tiny"], "twice")):  # fmt: skip
        with pytest.raises(InputError, match=word):
            parse_models(sources)
    with pytest.raises(InputError, match="--context"):
        bench_decode({"a": "mla:tiny"}, context=[0])


def test_bad_options_of_the_command():
    for arguments, word in ((("--context", "4k"), "'4k'"), (("--engine", "vlm"), "vlm")):
        done = run("bench", "decode", "mla:tiny", *arguments)
        assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_one_layers_step(monkeypatch):
    monkeypatch.setitem(decode._COPY_BYTES, "cpu", 2**20)
    done = run_inside("bench", "decode", "--op", "--batch", 3, "--repeats", 2)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["batch"] == 3 and row["state_bytes"] == 3 * 8 * 128 * 128 * 4
    assert row["error_ratio"] == 0, "on a CPU the plain form runs"
    assert row["fused_over_floor"] == pytest.approx(row["fused_s"] / row["floor_s"]) and row["parts_s"] > 0
    assert 0 < row["empty_s"] < row["moved_in_place_s"] < row["fused_s"], "the rungs rise"


def test_both_ways_through_a_layer_agree():
    inputs = LayerInputs(5, 2, 16, "cpu", torch.float32, seed=1)
    parts = inputs.parts()
    torch.testing.assert_close(inputs.step(), parts, rtol=1e-5, atol=1e-5)


def test_the_rungs_move_every_byte_once():
    """The kernel of `pieces` and `all_bytes`, interpreted on the CPU: each state and output is scaled, and no other."""
    pytest.importorskip("triton")
    code = """
        import torch
        from kimi_rl.bench.decode_op import LayerInputs
        for heads, dim in ((2, 32), (3, 8)):
            inputs = LayerInputs(3, heads, dim, "cpu", torch.float32, seed=1)
            state, conv_state = inputs.state.clone(), inputs.conv_state.clone()
            inputs.pieces(factor=2.0)
            assert torch.equal(inputs.state, 2 * state) and torch.equal(inputs.conv_state, conv_state)
            out = inputs.all_bytes(factor=2.0)
            assert torch.equal(inputs.state, 4 * state) and torch.equal(inputs.conv_state, 2 * conv_state)
            read = inputs.qkv.unflatten(-1, (3, -1)).sum(1) + inputs.raw_g + inputs.out_gate
            torch.testing.assert_close(out, 2 * (read + inputs.raw_beta.repeat_interleave(dim, -1)))
        print("checked")
    """
    assert interpreted(code).strip().endswith("checked")
