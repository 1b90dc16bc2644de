"""The SFT stage on a plain transformer: the source of a conversion, tuned like the model that was made of it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from kimi_rl.errors import InputError
from kimi_rl.learner.sft import run_sft
from kimi_rl.learner.stage import COMPLETE_MARK, StageContext, StageJob
from kimi_rl.model.source import forget_quantization, is_source, load_source, load_source_tokenizer
from kimi_rl.pipeline import check_inputs
from kimi_rl.recipe import Recipe, TokenizerSection
from kimi_rl.recipe_load import dump_recipe
from kimi_rl.run_dir import RunDir
from kimi_rl.tokenizer import build_tokenizer

DATA = {"task": "arithmetic", "params": {"level": 1}, "train_size": 60, "held_out_size": 6}
SFT = {"kind": "sft", "steps": 6, "batch_size": 8, "learning_rate": 1e-2, "schedule": "constant", "eval": None,
       "checkpoint_every": 3}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tokenizer = build_tokenizer(TokenizerSection(), [])
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, vocab_size=len(tokenizer), num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(source, *stages) -> Recipe:
    return Recipe.model_validate({"model": {"path": str(source)}, "data": DATA, "stages": list(stages)})


def tune(source, out, *, resume=False, **stage):
    chosen = recipe(source, {**SFT, **stage})
    run_dir = RunDir.create(out, dump_recipe(chosen), resume=resume)
    context = StageContext(StageJob(chosen, 0, str(out), str(source), "cpu", 1, resume=resume))
    run_sft(context)
    return context, [row for row in run_dir.read_metrics() if row["type"] == "train"]


def test_a_plain_transformer_is_tuned_and_stays_one(source, tmp_path):
    context, rows = tune(source, tmp_path / "run")
    assert context.pool is None  # nothing is generated
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    folder = context.save_final()
    assert is_source(str(folder))
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.config.model_type == "llama" and found.dtype == torch.float32
    start = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert not any(torch.equal(start[name], value) for name, value in found.state_dict().items())
    assert load_source_tokenizer(str(folder), "x")("1+1")["input_ids"] == context.tokenizer("1+1")["input_ids"]

    killed = tmp_path / "run" / "stages"
    (last,) = killed.glob("*/checkpoints/checkpoint-6")
    (last / COMPLETE_MARK).unlink()  # as if it had died while it wrote the second checkpoint
    again, repeated = tune(source, tmp_path / "run", resume=True)
    assert [row["step"] for row in repeated] == [1, 2, 3, 4, 5, 6]
    assert repeated[-1]["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "what"),
    [({**SFT, "eval": {}}, "stage sft evaluates"), ({"kind": "rlvr", "steps": 1}, "stage rlvr is of kind rlvr")],
)
def test_what_needs_kimi_linear_is_refused_before_anything_loads(source, stage, what):
    with pytest.raises(InputError, match=r"is a plain transformer.*" + what + r".*kimi-rl convert"):
        check_inputs(recipe(source, stage))


def test_a_gguf_folder_is_a_start_too(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    check_inputs(recipe(tmp_path, SFT))
    with pytest.raises(InputError, match="is a plain transformer"):
        check_inputs(recipe(tmp_path, {**SFT, "eval": {}}))


def test_weights_of_a_gguf_file_are_plain_and_may_be_trained(source, tmp_path):
    model = load_source(str(source), "x", dtype=torch.float32, device="cpu")
    model.is_quantized, model.quantization_method = True, "gguf"  # as transformers leaves them, dequantised or not
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model=model, args=arguments)
    forget_quantization(model)
    Trainer(model=model, args=arguments)
