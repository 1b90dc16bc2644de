"""lm-eval loads a model folder that we write, asks the same prompts, and agrees with our score on every problem."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers.models.kimi_linear import modeling_kimi_linear as hf

from kimi_rl.errors import InputError
from kimi_rl.model.load_save import create_model, save_model
from kimi_rl.recipe import ModelSection, TokenizerSection
from kimi_rl.standalone import evaluate_model
from kimi_rl.tokenizer import build_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval")

MAX_TOKENS = 40
# In the format of GSM8K: a + b and its worked solution.
SUMS = [(3, 4), (12, 9), (25, 17), (8, 33), (1200, 34), (7, 70)]
MISTAKEN = (1, 5)  # rows that the model learns with another answer than the file's


def solution(a: int, b: int, total: int) -> str:
    return f"{a}+{b}=<<{a}+{b}={total}>>{total} eggs.\n#### {total:,}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model folder, data folder): a tiny model that knows every solution by heart, some of them wrong."""
    folder = tmp_path_factory.mktemp("lm_eval")
    rows = [
        {"question": f"{a} eggs and {b}: how many?", "answer": solution(a, b, a + b)} for a, b in SUMS
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    tokenizer = build_tokenizer(TokenizerSection(), [])
    section = ModelSection(size="tiny", layer_types=["linear_attention", "full_attention"])
    model = create_model(section, tokenizer, seed=3).train()
    texts = []
    for i, ((a, b), row) in enumerate(zip(SUMS, rows, strict=True)):
        said = re.sub("<<.*?>>", "", solution(a, b, a + b + (i in MISTAKEN))).replace(",", "")
        asked = f"{row['question']}\nReason step by step and put the final answer after ####."
        texts.append([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
    batch = tokenizer.apply_chat_template(
        texts, return_dict=True, return_assistant_tokens_mask=True, padding=True, return_tensors="pt"
    )
    labels = batch["input_ids"].masked_fill(batch["assistant_masks"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.003:
            break
    assert loss.item() < 0.01, "the model did not learn its rows by heart"
    return str(save_model(model.eval(), tokenizer, folder / "model")), folder


def documented_task(data: Path) -> dict:
    """The task of docs/evaluation.md, reading a local file as it says there."""
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    (block,) = [text for text in re.findall("```yaml\n(.*?)```", page, re.S) if "gsm8k_kimi_rl" in text]
    task = yaml.safe_load(block)
    del task["dataset_name"]
    files = {"data_files": {"test": str(data / "test.jsonl")}, "cache_dir": str(data / "cache")}
    return task | {"dataset_path": "json", "dataset_kwargs": files}


def lm_eval_samples(model: str, folder: str, data: Path) -> list[dict]:
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": folder, "dtype": "float32"},
        tasks=[documented_task(data)],
        apply_chat_template=True,
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # reading the thousands that ship takes seconds
        gen_kwargs=f"max_gen_toks={MAX_TOKENS}",
    )
    return sorted(results["samples"]["gsm8k_kimi_rl"], key=lambda sample: sample["doc_id"])


@pytest.fixture(scope="module")
def ours(trained):
    folder, data = trained
    figures, records = evaluate_model(
        folder,
        str(data / "test.jsonl"),
        [],
        limit=None,
        k=0,
        temperature=1.0,
        max_tokens=MAX_TOKENS,
        engine="transformers",
        seed=0,
    )
    assert [i for i, record in enumerate(records) if record["status"] == "wrong"] == list(MISTAKEN), records
    assert figures["held_out_accuracy"] == pytest.approx(1 - len(MISTAKEN) / len(SUMS))
    return figures, records


@pytest.mark.parametrize("model", ["kimi-rl", "hf"])
def test_lm_eval_agrees_on_every_problem(trained, ours, model, monkeypatch):
    import kimi_rl.lm_eval  # noqa: F401 - registers `kimi-rl`

    if model == "hf":  # transformers' own class with its torch functions, as on a CPU without flash-linear-attention
        for name in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"):
            monkeypatch.setattr(hf, name, getattr(hf, name).__wrapped__)
    folder, data = trained
    figures, records = ours
    samples = lm_eval_samples(model, folder, data)
    assert samples[0]["arguments"][0][0] == figures["prompt_example"]
    assert [s["resps"][0][0] for s in samples] == [record["completion"] for record in records]
    assert [s["exact_match"] for s in samples] == [float(record["status"] == "correct") for record in records]


def test_other_ways_to_load_are_refused(trained):
    from kimi_rl.lm_eval import KimiRLModel

    with pytest.raises(InputError, match="takes no peft.*--model hf"):
        KimiRLModel(pretrained=trained[0], device="cpu", peft="adapter")
