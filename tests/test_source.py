"""Plain transformers as they come: recognised, read, and generated from."""

import json
import types

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kimi_rl.dataset import load_problems
from kimi_rl.errors import InputError
from kimi_rl.learner.sft import SFTLearner, sft_dataset
from kimi_rl.learner.trl_trainers import SFTConfig
from kimi_rl.model.source import export_source, is_gguf, is_source, read_source_config
from kimi_rl.recipe import DataSection, SFTStage, TokenizerSection
from kimi_rl.standalone import generate_from_file
from kimi_rl.tokenizer import build_tokenizer, prompt_ids


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama whose stop token is its generation config's alone, without a padding token."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = build_tokenizer(TokenizerSection(), [])
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, eos_token_id=1, pad_token_id=None,
        )
    )  # fmt: skip
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_source_is_told_from_a_kimi_model(llama, tiny_models, tmp_path):
    assert is_source(str(llama)) and not is_gguf(str(llama))
    assert not is_source(str(tiny_models["hybrid", "dense"]))
    assert not is_source(str(tmp_path)) and not is_source("no/such-model")
    (tmp_path / "model.gguf").write_bytes(b"")
    for path in (tmp_path, tmp_path / "model.gguf"):
        assert is_source(str(path)) and is_gguf(str(path))
    with pytest.raises(InputError, match="cannot read"):  # not a GGUF file inside
        read_source_config(str(tmp_path), "somewhere")


def test_generate_takes_a_source(llama, tmp_path):
    """Prompts of unlike length in one batch give what transformers gives to each alone."""
    questions = ["1+1?", "what is twelve and thirty-one?"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    answers = list(
        generate_from_file(
            str(llama), path, engine="transformers", temperature=0.0, top_p=1.0, max_tokens=12, seed=0
        )
    )
    model, tokenizer = LlamaForCausalLM.from_pretrained(llama), build_tokenizer(TokenizerSection(), [])
    for question, answer in zip(questions, answers, strict=True):
        ids = prompt_ids(tokenizer, [{"role": "user", "content": question}])
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(ids) :]
        assert answer["prompt_ids"] == ids and answer["token_ids"] == wanted.tolist()


def test_an_exported_source_is_the_same_model(llama, tmp_path):
    export_source(str(llama), "somewhere", tmp_path / "out")
    ours, theirs = (LlamaForCausalLM.from_pretrained(path).state_dict() for path in (llama, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].bfloat16(), theirs[name].bfloat16()) for name in ours)


def test_sft_reads_the_answer_alone_from_a_template_without_marks(llama, tmp_path):
    """The loss mask is what the template adds to the prompt: with our own template, what its marks say."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    marked = tokenizer.chat_template
    problems = load_problems(DataSection(task="arithmetic", train_size=3, held_out_size=2))
    context = types.SimpleNamespace(
        stage=SFTStage(kind="sft", steps=1, batch_size=3), tokenizer=tokenizer, problems=problems,
        record=lambda *a, **k: None,
    )  # fmt: skip

    def trained_on(template):
        tokenizer.chat_template = template
        trainer = SFTLearner(
            model=LlamaForCausalLM.from_pretrained(llama),
            args=SFTConfig(
                output_dir=str(tmp_path), completion_only_loss=True, assistant_only_loss=template == marked,
                max_length=None, report_to="none", use_cpu=True, bf16=False,
            ),
            train_dataset=sft_dataset(context),
            processing_class=tokenizer,
        )
        return [row["labels"] for row in trainer.train_dataset]

    wanted = []
    for prompt, solution in zip(problems.train["prompt"], problems.train["solution"], strict=True):
        messages = [*prompt, {"role": "assistant", "content": solution}]
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, masks = found["input_ids"], found["assistant_masks"]
        wanted.append([token if mask else -100 for token, mask in zip(ids, masks, strict=True)])
        assert 0 < sum(masks) < len(masks)
    assert trained_on(marked) == wanted
    plain = marked.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert plain != marked and trained_on(plain) == wanted
