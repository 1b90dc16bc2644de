"""The distill stage on tiny models: what it learns, what it leaves alone, and that texts do not see each other."""

import contextlib
import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kimi_rl import pipeline
from kimi_rl.errors import InputError
from kimi_rl.kernels.segments import Segments
from kimi_rl.learner.actor import Learner
from kimi_rl.learner.distill import load_texts, run_distill
from kimi_rl.learner.distill_trainers import mix
from kimi_rl.learner.packing import Sample, packed_states
from kimi_rl.learner.packing import pack as pack_samples
from kimi_rl.learner.stage import StageContext, StageJob
from kimi_rl.learner.teacher import Teacher
from kimi_rl.learner.texts import Texts, check_texts, rows_in_order, shuffled_rows
from kimi_rl.model.load_save import create_model, save_model
from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.pipeline import check_inputs
from kimi_rl.recipe import ModelSection, Recipe, TokenizerSection
from kimi_rl.recipe_load import dump_recipe
from kimi_rl.report import render_text_summary
from kimi_rl.run_dir import RunDir
from kimi_rl.tokenizer import build_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 48}
DATA = {"task": "arithmetic", "params": {"level": 1}, "train_size": 60, "held_out_size": 6}
STAGE = {"kind": "distill", "steps": 8, "max_length": 64, "pack_tokens": 256, "batch_tokens": 512, "log_every": 1,
         "learning_rate": 1e-2, "schedule": "constant", "perplexity_every": 4, "checkpoint_every": 4}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama, and a hybrid with its embeddings, feed-forwards and norms: what a conversion would keep."""
    root = tmp_path_factory.mktemp("pair")
    tokenizer = build_tokenizer(TokenizerSection(), [])
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            **SHAPE, vocab_size=len(tokenizer), num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            initializer_range=0.2, tie_word_embeddings=False, max_position_embeddings=512,
        )
    )  # fmt: skip
    llama.save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    section = ModelSection(
        layer_types=["linear_attention", "full_attention"],
        overrides={**SHAPE, "linear_head_dim": 16, "rms_norm_eps": llama.config.rms_norm_eps},
    )
    student = create_model(section, tokenizer, seed=1)
    kept = {name: value for name, value in llama.state_dict().items() if "self_attn" not in name}
    missing, unexpected = student.load_state_dict(kept, strict=False)
    assert not unexpected and all("self_attn" in name for name in missing)
    save_model(student, tokenizer, root / "student")
    return root


def recipe(folders, **stage) -> Recipe:
    entry = {**STAGE, "teacher": str(folders / "teacher"), **stage}
    return Recipe.model_validate({"model": {"path": str(folders / "student")}, "data": DATA, "stages": [entry]})


def distil(folders, out, *, resume=False, device="cpu", **stage):
    """The stage in this process. Returns its figures, its context and its rows of metrics."""
    chosen = recipe(folders, **stage)
    run_dir = RunDir.create(out, dump_recipe(chosen), resume=resume)
    context = StageContext(StageJob(chosen, 0, str(out), str(folders / "student"), device, 1, resume=resume))
    torch.manual_seed(0)
    return run_distill(context), context, run_dir.read_metrics()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def pack_of(*lengths):
    texts = Texts(1000)
    generator = torch.Generator().manual_seed(5)
    for length in lengths:
        texts.add(torch.randint(250, (length,), generator=generator).tolist())
    return texts


# --- learning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matching_layers_lowers_every_error_and_touches_only_token_mixers(folders, tmp_path, optimizer):
    figures, context, rows = distil(folders, tmp_path / "run", match="layers", optimizer=optimizer)
    (before,) = [row for row in rows if row["type"] == "eval" and row["when"] == "before"]
    assert len(figures["layer_errors"]) == 2
    for first, last in zip(before["layer_errors"], figures["layer_errors"], strict=True):
        assert last < 0.9 * first
    assert figures["student_perplexity"] < before["student_perplexity"]
    assert figures["teacher_perplexity"] == before["teacher_perplexity"]
    source = KimiLinearForCausalLM.from_pretrained(folders / "student")
    for name, old in weights(source).items():
        new = context.model.get_parameter(name)
        assert torch.equal(old, new) == ("self_attn" not in name), name
    steps = [row for row in rows if row["type"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 9))
    for row in steps:  # the loss is the mean of the layers' errors, over the step's two rows
        assert row["loss"] == pytest.approx(row["layer_error_mean"], rel=1e-5)
        assert row["layer_error_max"] == max(row["layer_errors"]) and row["tokens_per_s"] > 0


def test_matching_logits_lowers_the_divergence(folders, tmp_path):
    figures, context, rows = distil(
        folders, tmp_path / "run", match="logits", temperature=2.0, ce=0.5, log_every=3, checkpoint_every=3
    )
    steps = [row for row in rows if row["type"] == "train"]
    assert [row["step"] for row in steps] == [1, 3, 6, 8]
    assert steps[-1]["kl_to_teacher"] < 0.7 * steps[0]["kl_to_teacher"]
    for row in steps:
        assert row["loss"] == pytest.approx(4 * row["kl_to_teacher"] + 0.5 * row["cross_entropy"], rel=1e-4)
    evals = {row["when"]: row for row in rows if row["type"] == "eval"}
    assert figures["student_perplexity"] == evals["after"]["student_perplexity"]
    gap = {when: row["student_perplexity"] / row["teacher_perplexity"] for when, row in evals.items()}
    assert gap["after"] < gap["during"] < gap["before"]
    source = KimiLinearForCausalLM.from_pretrained(folders / "student")
    assert all(not torch.equal(old, context.model.get_parameter(name)) for name, old in weights(source).items())


def test_the_teacher_taught_by_itself_has_nothing_to_learn(folders):
    """What the student is to give is what the teacher adds to its residual stream: a mixer that is the teacher's
    attention has no error."""
    teacher = Teacher(str(folders / "teacher"), "teacher", dtype=torch.float32, device="cpu")
    pack = pack_of(20, 13).pack([0, 1])
    seen = {}
    last = teacher.run(pack, lambda index, states, out: seen.update({index: (states, out)}))
    for index, layer in enumerate(teacher.layers):
        states, out = seen[index]
        rest = states + out
        rest = rest + layer.mlp(layer.post_attention_layernorm(rest))
        after = seen[index + 1][0] if index + 1 in seen else None
        if after is not None:
            torch.testing.assert_close(rest, after)
        else:
            torch.testing.assert_close(teacher.model.model.norm(rest)[0], last)


@pytest.mark.parametrize("match", ["layers", "logits"])
def test_resumed_equals_undisturbed(folders, tmp_path, match):
    settings = dict(match=match, optimizer="muon", schedule="cosine", warmup_steps=2)
    whole, context, rows = distil(folders, tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in (tmp_path / "cut" / "stages").glob("*/checkpoints/checkpoint-8"):
        shutil.rmtree(folder)
    again, resumed, more = distil(folders, tmp_path / "cut", resume=True, **settings)
    assert again == whole
    ours, theirs = weights(context.model), weights(resumed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    keep = ("type", "when", "step", "loss", "grad_norm", "learning_rate", "layer_errors", "kl_to_teacher",
            "student_perplexity")  # fmt: skip
    told = [
        [{key: row.get(key) for key in keep} for row in found if row["type"] != "note"] for found in (rows, more)
    ]
    assert told[0] == told[1]


# --- texts stay apart -------------------------------------------------------------------------------------------


def test_texts_of_a_row_do_not_see_each_other(folders):
    teacher = Teacher(str(folders / "teacher"), "teacher", dtype=torch.float32, device="cpu")
    student = KimiLinearForCausalLM.from_pretrained(folders / "student")
    texts = pack_of(30, 7, 22)
    row, alone = texts.pack([0, 1, 2]), [texts.pack([number]) for number in range(3)]

    def mixed(pack):
        found = []

        def take(index, states, out):
            found.append(mix(student.model.layers[index], states, pack.segments)[0])

        teacher.run(pack, take)
        return torch.cat(found, dim=-1)

    for run in (teacher.run, lambda pack: packed_states(student, pack), mixed):
        with torch.no_grad():
            together, apart = run(row), torch.cat([run(pack) for pack in alone])
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
        # The same comparison sees a leak.
        leaking = type(row)(**{**vars(row), "segments": Segments([0, 59])})
        with torch.no_grad():
            assert (run(leaking) - apart)[30:].abs().max() > 1e-2
    for number, pack in enumerate(alone):  # and the teacher is the model that transformers runs
        plain = LlamaForCausalLM.from_pretrained(folders / "teacher")
        with torch.no_grad():
            wanted = plain.model(torch.tensor([texts.ids[number]])).last_hidden_state[0]
        torch.testing.assert_close(teacher.run(pack), wanted, rtol=1e-4, atol=1e-5)


def test_every_token_but_a_text_s_first_is_scored():
    texts = pack_of(4, 3)
    pack = texts.pack([1, 0])
    assert pack.scored_places.tolist() == [0, 1, 3, 4, 5]
    assert pack.scored_tokens.tolist() == texts.ids[1][1:] + texts.ids[0][1:]
    assert pack.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3]]


def test_a_row_of_texts_is_that_of_samples():
    """Laid out by a few operations over all texts, as `pack` lays out samples whose prompt is their first token."""
    texts = pack_of(4, 2, 9, 30, 2)
    for rows in ([2], [1], [3, 0, 4], [0, 1, 2, 3, 4], [1, 1]):
        ids = [torch.tensor(texts.ids[row]) for row in rows]
        samples = [Sample(row, x[:1], x[1:], torch.arange(len(x) - 1), b"") for row, x in zip(rows, ids, strict=True)]
        found, wanted = texts.pack(rows), pack_samples(samples, share_prompts=False)
        assert found.segments.bounds == wanted.segments.bounds
        for name in ("input_ids", "positions", "scored_places", "scored_tokens", "rows", "columns"):
            one, other = getattr(found, name), getattr(wanted, name)
            assert one.dtype == other.dtype and torch.equal(one, other), name
    texts.add([5, 6, 7])  # after a row was packed
    assert texts.pack([5, 1]).input_ids.tolist() == [[5, 6, 7, *texts.ids[1]]]


def test_on_a_card_the_teacher_s_norms_and_feed_forwards_are_fused(folders, monkeypatch):
    """With their plain forms in place of the card's: the same states as transformers' own."""
    pack = pack_of(20, 13).pack([0, 1])
    own = Teacher(str(folders / "teacher"), "teacher", dtype=torch.float32, device="cpu").run(pack)
    seen = []

    def choose(kernel, tensor, **has):
        seen.append(kernel)
        return "fla"

    monkeypatch.setattr("kimi_rl.learner.teacher.choose", choose)
    fused = Teacher(str(folders / "teacher"), "teacher", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(fused.run(pack), own)
    assert (seen.count("rms_norm"), seen.count("swiglu")) == (5, 2)
    with torch.no_grad():
        fused.layers[0].post_attention_layernorm.weight.mul_(2)
    assert not torch.allclose(fused.run(pack), own, rtol=0.1), "its weights are read"


def test_rows_are_full_and_a_function_of_the_seed():
    lengths = [5, 9, 3, 7, 4, 8]
    rows = shuffled_rows(lengths, 16, 10, seed=1)
    assert rows == shuffled_rows(lengths, 16, 10, seed=1) != shuffled_rows(lengths, 16, 10, seed=2)
    assert shuffled_rows(lengths, 16, 4, seed=1) == rows[:4]
    flat = [number for row in rows for number in row]
    for start in range(0, len(flat) - 5, 6):  # each time round every text once
        assert sorted(flat[start : start + 6]) == list(range(6))
    for row, following in zip(rows, rows[1:], strict=False):
        used = sum(lengths[number] for number in row)
        assert used <= 16 < used + lengths[following[0]]
    assert rows_in_order(lengths, 16) == [[0, 1], [2, 3, 4], [5]]
    assert shuffled_rows([20], 16, 2, seed=0) == [[0], [0]]


def test_long_texts_are_cut_with_a_count():
    texts = Texts(3)
    for ids in ([1, 2, 3, 4], [5], [6, 7]):
        texts.add(ids)
    assert (texts.ids, texts.cut, texts.lengths) == ([[1, 2, 3], [6, 7]], 1, [3, 2])


# --- bad input --------------------------------------------------------------------------------------------------


def refused(chosen: Recipe) -> str:
    with pytest.raises(InputError) as caught:
        check_inputs(chosen)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": 3}, "the teacher has num_hidden_layers 3, the student's is 2"),
        ({"hidden_size": 64}, "the teacher has hidden_size 64, the student's is 32"),
        ({"vocab_size": 300}, "the teacher has vocab_size 300, the student's is 264"),
        ({"model_type": "gpt2"}, "has model_type 'gpt2'; known are llama"),
        ({"model_type": "nonsense"}, "cannot read"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_by_its_configuration(folders, tmp_path, change, expected):
    config = json.loads((folders / "teacher" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    found = refused(recipe(folders, match="logits", teacher=str(tmp_path)))
    assert found.startswith("stages.distill.teacher: ") and expected in found


def test_a_teacher_that_is_not_there_is_refused(folders, tmp_path):
    def message(teacher):
        return refused(recipe(folders, match="layers", teacher=str(teacher)))

    assert "is neither a folder, a .gguf file nor a hub id" in message(tmp_path / "none")
    assert "has no config.json and no .gguf files" in message(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "b.gguf").write_bytes(b"")
    assert "has no config.json and 2 .gguf files" in message(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    assert "is a file; give a folder, a hub id or a .gguf file" in message(tmp_path / "model.bin")


def test_another_tokenizer_is_refused_before_the_teacher_loads(folders, tmp_path):
    shutil.copytree(folders / "teacher", tmp_path / "teacher")
    other = build_tokenizer(TokenizerSection(kind="bpe", vocab_size=280), ["question answer " * 9])
    other.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="student and teacher need one tokenizer"):
        distil(folders, tmp_path / "run", match="logits", teacher=str(tmp_path / "teacher"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "1+1"}, "row 2: needs `text`, or `prompt_ids` and `token_ids`"),
        ({"text": 3}, "row 2: needs `text`"),
        ({"prompt_ids": [1], "token_ids": ["x"]}, "row 2: needs `text`"),
    ],
)
def test_files_of_texts_are_checked(tmp_path, row, expected):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=expected):
        check_texts(str(path), "stages.distill.texts")
    with pytest.raises(InputError, match="no such file"):
        check_texts(str(tmp_path / "none"), "stages.distill.texts")


def test_texts_from_a_file_are_read(folders, tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [{"text": "12 and 30"}, {"text": "not this", "prompt_ids": [5, 6], "token_ids": [7, 258]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = recipe(folders, match="logits", texts=str(path))
    run_dir = RunDir.create(tmp_path / "run", dump_recipe(chosen))
    context = StageContext(StageJob(chosen, 0, str(run_dir.path), str(folders / "student"), "cpu", 1, resume=False))
    texts, held_out = load_texts(context)
    assert texts.ids[-2:] == [list(b"12 and 30"), [5, 6, 7, 258]]
    assert (len(texts.ids), len(held_out.ids)) == (62, 6)
    lines[1]["token_ids"] = [264]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="token id 264 is outside the vocabulary of 264"):
        load_texts(context)


# --- a whole run ------------------------------------------------------------------------------------------------


@pytest.fixture
def without_ray(monkeypatch):
    """Stages run in this process: the learner's class without its actor."""

    def run_stage(chosen, index, run_dir, start_model, device, resume):
        job = StageJob(chosen, index, str(run_dir.path), start_model, device, 1, resume)
        return Learner.__ray_metadata__.modified_class().run(job)

    monkeypatch.setattr(pipeline, "local_ray", lambda kernel_cache: contextlib.nullcontext())
    monkeypatch.setattr(pipeline, "_run_stage", run_stage)
    monkeypatch.setattr("ray.cluster_resources", dict)
    monkeypatch.setattr(pipeline, "whole_cards", lambda: 0)  # asking Ray would start one, of which nobody knows


def test_a_run_stops_after_a_stage_and_goes_on_from_there(without_ray, folders, tmp_path):
    entries = [
        {**STAGE, "name": name, "match": name, "steps": 2, "perplexity_every": 0, "teacher": str(folders / "teacher")}
        for name in ("layers", "logits")
    ]
    chosen = Recipe.model_validate({"model": {"path": str(folders / "student")}, "data": DATA, "stages": entries})
    with pytest.raises(InputError, match="--until: no stage 'rlvr' in run; stages: layers, logits"):
        pipeline.train(chosen, tmp_path / "run", until="rlvr")
    summary = pipeline.train(chosen, tmp_path / "run", until="layers")
    assert summary["status"] == "stopped" and [stage["name"] for stage in summary["stages"]] == ["layers"]
    assert summary["model"] == summary["stages"][0]["model"] and not (tmp_path / "run" / "model").exists()
    assert "stopped" in render_text_summary(tmp_path / "run")
    whole = pipeline.train(chosen, tmp_path / "run", resume=True)
    assert whole["status"] == "complete" and whole["stages"][0] == summary["stages"][0]
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert pipeline.train(chosen, tmp_path / "run", resume=True, until="layers")["status"] == "complete"


def test_a_recipe_of_both_ways_is_recorded(without_ray, folders, tmp_path):
    entries = [
        {**STAGE, "name": name, "match": name, "steps": 2, "perplexity_every": 0, "teacher": str(folders / "teacher")}
        for name in ("layers", "logits")
    ]
    chosen = Recipe.model_validate({"model": {"path": str(folders / "student")}, "data": DATA, "stages": entries})
    summary = pipeline.train(chosen, tmp_path / "run")
    layers, logits = summary["stages"]
    assert logits["student_perplexity"] < layers["student_perplexity"]
    assert len(layers["layer_errors"]) == 2 and "held_out_accuracy" not in logits
    first = [row for row in RunDir(tmp_path / "run").read_metrics() if row["type"] == "eval"]
    assert first[2]["student_perplexity"] == pytest.approx(layers["student_perplexity"])  # it goes on from there
    page = (tmp_path / "run" / "report.html").read_text()
    assert "held-out perplexity" in page and "Error by layer" in page and "KL to the teacher" in page
    assert "perplexity" in render_text_summary(tmp_path / "run")
    assert (tmp_path / "run" / "model" / "config.json").is_file()
