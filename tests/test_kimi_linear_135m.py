"""benchmarks/kimi_linear_135m: planner and scheduler on steps that do little, and the whole graph on tiny models."""

import contextlib
import io
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from kimi_rl import pipeline, standalone
from kimi_rl.cli import app
from kimi_rl.errors import InputError
from kimi_rl.learner.actor import Learner
from kimi_rl.learner.stage import StageJob
from kimi_rl.recipe import TokenizerSection
from kimi_rl.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from kimi_linear_135m import command, graph, plot  # noqa: E402
from kimi_linear_135m.scheduler import Card, Scheduler, Step, check_graph, forecast, read_state  # noqa: E402

# --- placing and forecasting ------------------------------------------------------------------------------------


def on_card(name, seconds, load=1.0, gib=10.0, **more):
    return Step(name, [], seconds, load=load, gib=gib, **more)


def cards(count, gib=80.0):
    return [Card(str(number), "card", gib) for number in range(count)]


def test_steps_spread_over_cards_and_share_where_there_are_too_few():
    heavy = [on_card(f"heavy_{i}", 100) for i in range(2)]
    assert forecast(heavy, cards(2), 8) == {"heavy_0": (0, 100), "heavy_1": (0, 100)}
    together = forecast(heavy, cards(1), 8)  # both have room, and each gets half of the card
    assert together["heavy_0"] == together["heavy_1"] == (0, pytest.approx(200))
    large = [on_card(f"large_{i}", 100, gib=40) for i in range(2)]  # not beside each other
    assert [end for _, end in forecast(large, cards(1), 8).values()] == [pytest.approx(100), pytest.approx(200)]
    assert forecast([on_card("huge", 5, gib=500)], cards(1), 8) == {"huge": (0, 5)}  # it is tried all the same


def test_a_step_on_several_cards_waits_for_as_many_and_slows_all_of_them():
    wide = on_card("wide", 100, cards=2)
    assert forecast([wide, on_card("other", 30)], cards(2), 8)["wide"] == (0, pytest.approx(130))
    filled = [on_card("before", 50, gib=60), on_card("wide", 100, gib=40, cards=2, after=("before",)),
              on_card("late", 10, gib=60, after=("before",))]  # fmt: skip
    times = forecast(filled, cards(2), 8)
    assert times["wide"] == (50, pytest.approx(150)) and times["late"] == (pytest.approx(150), pytest.approx(160))
    assert forecast([on_card("wide", 9, cards=3)], cards(2), 8) == {}  # it can never start
    going = forecast([wide, on_card("late", 10, gib=75)], cards(2), 8, running={"wide": ("0,1", 20)})
    assert going["wide"][1] == pytest.approx(20) and going["late"] == (pytest.approx(20), pytest.approx(30))


def test_a_start_is_no_work_for_the_card():
    steps = [on_card(name, 100, start_s=60) for name in "ab"]
    assert [end for _, end in forecast(steps, cards(1), 8).values()] == [pytest.approx(60 + 80)] * 2


def test_what_most_hangs_on_comes_first_and_processes_are_bounded():
    steps = [Step("light", [], 10), Step("first", [], 10), Step("second", [], 50, needs=("first",))]
    assert forecast(steps, cards(1), 1) == {"first": (0, 10), "second": (10, 60), "light": (60, 70)}
    assert forecast(steps, cards(1), 2)["light"] == (0, 10)


def test_forecast_goes_on_from_what_runs():
    steps = [on_card("gone", 3), on_card("a", 100), on_card("b", 10, needs=("a",)), on_card("c", 7, after=("gone",))]
    found = forecast(steps, cards(1), 4, ended=["gone"], running={"a": ("0", 30)})
    ends = {name: end for name, (_, end) in found.items()}
    assert ends == {"a": pytest.approx(37), "c": pytest.approx(14), "b": pytest.approx(47)}


def test_graphs_are_checked():
    with pytest.raises(ValueError, match=r"step b: needs \['a'\] before it"):
        check_graph([Step("b", [], 1, needs=("a",)), Step("a", [], 1)])
    with pytest.raises(ValueError, match="step a: stands twice"):
        check_graph([Step("a", [], 1), Step("a", [], 1)])


# --- running ----------------------------------------------------------------------------------------------------


def python(text):
    return [sys.executable, "-c", text]


def touch(name, **more):
    return Step(name, python(f"open('{name}', 'a').write('x')"), 1, makes=name, **more)


def run(steps, folder, seconds=60, **more):
    scheduler = Scheduler(steps, cards(2), 4, folder, seconds, poll_s=0.02, say=lambda text: None, **more)
    return scheduler.run(), scheduler


def test_a_failure_stops_only_what_needs_it_and_a_second_call_repeats_nothing(tmp_path):
    broken = Step("broken", python("print('some words'); print('no disk'); raise SystemExit(3)"), 1)
    empty = Step("empty", python("pass"), 1, makes="nowhere")
    steps = [touch("a"), broken, empty, touch("b", needs=("broken",)), touch("c", needs=("a",), after=("broken",)),
             touch("d", needs=("b",))]  # fmt: skip
    whole, scheduler = run(steps, tmp_path)
    assert not whole and scheduler.names("done") == ["a", "c"] and scheduler.names("blocked") == ["b", "d"]
    state = read_state(tmp_path)["steps"]
    assert state["broken"]["error"] == "exit code 3: no disk" and "left no nowhere" in state["empty"]["error"]
    assert state["d"]["error"] == "needs b"
    assert "some words" in (tmp_path / "logs" / "broken.log").read_text()
    broken.command, empty.command = python("pass"), python("open('nowhere', 'w')")
    whole, scheduler = run(steps, tmp_path)
    assert whole and (tmp_path / "a").read_text() == (tmp_path / "c").read_text() == "x"
    (tmp_path / "a").unlink()  # what a step left is gone: it is made again, alone
    assert run(steps, tmp_path)[0]
    assert (tmp_path / "a").read_text() == "x" == (tmp_path / "c").read_text()


def test_what_runs_when_the_time_is_over_is_interrupted_and_goes_on_later(tmp_path):
    text = "import time, os\ntry: time.sleep(0 if os.path.exists('begun') else 60)\nfinally: open('begun', 'w')"
    steps = [Step("slow", python(text), 1), touch("next", needs=("slow",))]
    start = time.time()
    whole, scheduler = run(steps, tmp_path, seconds=1.5)
    assert not whole and time.time() - start < 10
    assert scheduler.records["slow"].status == "stopped" and "time of this call" in scheduler.records["slow"].error
    assert (tmp_path / "begun").exists()  # it was asked, not killed
    assert run(steps, tmp_path)[0]


@pytest.mark.parametrize(("load", "beside"), [(0.4, True), (0.6, False)])
def test_what_reads_the_half_of_a_run_starts_beside_it_where_a_card_has_time(tmp_path, load, beside):
    wait = "import os, time\nopen('half', 'w')\nend = time.time() + {}\n"
    wait += "while time.time() < end and not os.path.exists('read'): time.sleep(0.01)\n"
    text = wait.format(20 if beside else 0.5) + "open('ended', 'w').write(str(os.path.exists('read')))"
    steps = [Step("run", python(text), 1, load=0.5, makes="ended"),
             touch("read", needs=("run",), reads="half", load=load)]  # fmt: skip
    scheduler = Scheduler(steps, cards(1), 4, tmp_path, 60, poll_s=0.02, say=lambda text: None)
    assert scheduler.run() and (tmp_path / "ended").read_text() == str(beside)


def test_what_reads_the_half_of_a_run_that_failed_is_run_all_the_same(tmp_path):
    broken = Step("run", python("open('half', 'w'); raise SystemExit(1)"), 1)
    steps = [broken, touch("read", needs=("run",), reads="half"), touch("after", needs=("run",))]
    whole, scheduler = run(steps, tmp_path)
    assert (scheduler.names("done"), scheduler.names("blocked")) == (["read"], ["after"])


def test_a_step_over_its_limit_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(Step, "limit_s", 0.5)
    whole, scheduler = run([Step("stuck", python("import time; time.sleep(60)"), 1), touch("other")], tmp_path)
    assert not whole and scheduler.names("done") == ["other"]
    assert scheduler.records["stuck"].error == "took longer than its limit"


def test_steps_see_their_card_and_settle_once_their_needs_are_met(tmp_path):
    def settle(step):
        step.command = python("open('seen', 'w').write(open('a').read() + os.environ['CUDA_VISIBLE_DEVICES'])")
        step.command[2] = "import os; " + step.command[2]

    def bad(step):
        raise InputError("no such data")

    steps = [touch("a"), Step("b", [], 1, needs=("a",), load=1.0, settle=settle), Step("c", [], 1, settle=bad)]
    whole, scheduler = run(steps, tmp_path)
    assert not whole and (tmp_path / "seen").read_text() == "x0"
    assert scheduler.records["c"].error == "InputError: no such data"


def test_a_step_on_several_cards_sees_all_of_them(tmp_path):
    text = "import os; open('seen', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    whole, scheduler = run([Step("wide", python(text), 1, load=1.0, cards=2)], tmp_path)
    assert whole and (tmp_path / "seen").read_text() == "0,1" == scheduler.records["wide"].card
    assert not any(card.steps for card in scheduler.cards)


# --- the plan ---------------------------------------------------------------------------------------------------


def planner(tmp_path, count=4, **more):
    settings = graph.Settings(
        command.SOURCE, dict(command.DATA), tmp_path, cores=16 * count, threads=4,
        **{"layers_share": 0.08, "cards": cards(count, 79.6), **more},
    )  # fmt: skip
    made = graph.Planner(settings)
    seconds = 60 * settings.minutes - graph.RESULTS_S
    made.scheduler = Scheduler(made.steps(), settings.cards, settings.slots, tmp_path, seconds, notes=settings.kept)
    return made


def test_logits_takes_the_time_that_the_rest_leaves(tmp_path):
    by_minutes = {}
    for minutes in (35, 50):
        made = planner(tmp_path, minutes=minutes)
        by_minutes[minutes] = made.decide("logits")["steps"]
        ends = made.outlook()
        last = max(end for _, end in ends.values())
        budget = 60 * minutes * (1 - graph.SLACK) - graph.RESULTS_S
        assert 0.9 * budget < last <= budget
        assert ends["logits_mla"][1] <= ends["run_mla_1"][0]
    assert by_minutes[50] - by_minutes[35] > 0.7 * 15 * 60 / graph.STEP_S["logits"]
    assert planner(tmp_path, 2, minutes=35).decide("logits")["steps"] < by_minutes[35]
    alone = planner(tmp_path, minutes=35, until="logits")
    assert alone.decide("logits")["steps"] > by_minutes[35]
    assert not any(step.name.startswith("run") for step in alone.steps())
    later = planner(tmp_path, minutes=35, until="logits", scores=False)
    assert [s.name for s in later.steps()] == [s.name for s in alone.steps() if not s.name.startswith("score")]
    assert later.decide("logits")["steps"] > alone.decide("logits")["steps"]
    assert planner(tmp_path, minutes=1).decide("logits")["steps"] == int(graph.LEAST_S / graph.STEP_S["logits"])


def test_the_slower_arm_s_probe_counts_for_both_and_decisions_last(tmp_path):
    (tmp_path / "probes").mkdir()
    for arm, step_s, pack in (("hybrid", 1.0, 32768), ("mla", 1.4, 16384)):
        row = {"step_s": step_s, "pack_tokens": pack, "peak_gib": 30.0}
        (tmp_path / "probes" / f"{arm}.json").write_text(json.dumps({"layers": row, "logits": row}))
    for part in range(2):
        (tmp_path / f"samples_{part}.jsonl").write_text('{"text": "a text"}\n' * (part + 1))
        figures = {"rows": part + 1, "tokens": 10, "seconds": 2.0 + part, "tokens_per_s": 5.0}
        (tmp_path / f"samples_{part}.json").write_text(json.dumps(figures))
    made = planner(tmp_path)
    for arm in ("hybrid", "mla"):
        (step,) = (step for step in made.scheduler.steps if step.name == f"logits_{arm}")
        step.settle(step)
        stage = graph.load_recipe(tmp_path / step.command[4]).stages[0]
        assert (stage.pack_tokens, stage.texts) == (16384, "samples.jsonl")
        assert stage.steps == made.decisions["logits"]["steps"] and made.decisions["logits"]["step_s"] == 1.4
        assert step.gib == pytest.approx(35)
        time.sleep(0.05)
    assert (tmp_path / "samples.jsonl").read_text() == '{"text": "a text"}\n' * 3
    figures = {"parts": 2, "rows": 3, "tokens": 20, "tokens_per_s": 10.0, "seconds": 3.0}
    assert json.loads((tmp_path / "samples.json").read_text()) == figures
    (tmp_path / "probes" / "mla.json").unlink()  # a later call keeps to what was decided
    again = graph.Planner(made.settings)
    assert again.decisions == made.decisions and again.decisions is made.settings.kept["decisions"]


def test_arms_are_distilled_on_all_cards(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_cards", lambda asked: cards(len(asked.split(","))))
    def settings(*words):
        return command.make_settings(command.parse(["--out", str(tmp_path), *words]))

    assert [settings("--cards", ids).learners for ids in ("0", "0,1", "0,1,2,3", "0,1,2,3,4")] == [1, 1, 2, 2]
    assert settings("--cards", "0,1", "--arms", "mla").learners == 2
    with pytest.raises(InputError, match="--learners 3: more than the 2 cards"):
        settings("--cards", "0,1", "--learners", "3")
    one, two = planner(tmp_path / "1"), planner(tmp_path / "2", learners=2)
    for made, learners in ((one, 1), (two, 2)):
        (step,) = (step for step in made.scheduler.steps if step.name == "logits_mla")
        step.settle(step)
        stage = graph.load_recipe(made.settings.out / step.command[4]).stages[0]
        assert step.cards == stage.learners == learners
        assert (stage.batch_tokens, stage.pack_tokens) == (learners * 32768, 32768)
    assert two.outlook()["logits_hybrid"][0] == two.outlook()["logits_mla"][0]  # both at once

    # A later call has fewer cards, or more: the steps stay what was decided, and what was begun otherwise begins anew.
    for made, learners, expected in ((two, 1, 1), (one, 2, 1)):
        begun = made.settings.out / "runs/logits_mla"
        begun.mkdir(parents=True)
        (begun / "recipe.yaml").write_text((made.settings.out / "recipes/logits_mla.yaml").read_text())
        again = planner(made.settings.out, learners=learners, kept=made.settings.kept)
        (step,) = (step for step in again.scheduler.steps if step.name == "logits_mla")
        step.settle(step)
        stage = graph.load_recipe(made.settings.out / step.command[4]).stages[0]
        assert step.cards == stage.learners == expected
        assert stage.batch_tokens == made.decisions["logits"]["rows"] * 32768
        assert stage.steps == made.decisions["logits"]["steps"]
        assert ("--resume" in step.command) == begun.exists() == (made is one)
    assert two.decisions["logits"]["rows"] == 2


def test_distillation_may_go_straight_to_the_logits(tmp_path):
    both, straight = planner(tmp_path / "1"), planner(tmp_path / "2", layers_share=0)
    names = {step.name for step in straight.scheduler.steps}
    assert names == {step.name for step in both.scheduler.steps} - {"layers_hybrid", "layers_mla"}
    assert straight.decide("logits")["steps"] > both.decide("logits")["steps"] + 100
    (step,) = (step for step in straight.scheduler.steps if step.name == "logits_mla")
    assert step.needs == ("convert_mla",) and {"convert_hybrid", "probe_hybrid", "sample_3"} <= {*step.after}
    step.settle(step)
    recipe = graph.load_recipe(tmp_path / "2" / step.command[4])
    assert recipe.model.path == "models/mla" and [stage.name for stage in recipe.stages] == ["logits"]
    (probe,) = (step for step in straight.scheduler.steps if step.name == "probe_mla")
    probe.settle(probe)
    assert [path.name for path in (tmp_path / "2/recipes").glob("probe_*")] == ["probe_logits_mla.yaml"]


def test_a_tuned_model_is_scored_while_its_run_goes_on(tmp_path):
    steps = {step.name: step for step in planner(tmp_path).scheduler.steps}
    score = steps["score_sft_hybrid_1"]
    assert score.reads == "compare/runs/hybrid/seed_1/stages/0_sft/model" and score.command[3] == score.reads
    assert score.needs == ("run_hybrid_1",) and steps["score_rlvr_hybrid_1"].reads is None
    assert steps["run_hybrid_1"].load + score.load <= 1 < 2 * steps["run_hybrid_1"].load + score.load


def test_what_the_runs_compile_is_compiled_before(tmp_path):
    made = planner(tmp_path, start={"mla": "/models/distilled"})
    steps = {step.name: step for step in made.scheduler.steps}
    assert steps["warm_up_hybrid"].needs == ("convert_hybrid",) and steps["warm_up_mla"].needs == ()
    assert not any("warm_up" in name for step in steps.values() for name in (*step.needs, *step.after))
    for arm, model in (("hybrid", "models/hybrid"), ("mla", "/models/distilled")):
        step, run = steps[f"warm_up_{arm}"], graph.run_recipe(made.settings, arm, 0)
        step.settle(step)
        recipe = graph.load_recipe(tmp_path / step.command[4])
        assert recipe.model.path == model and [stage.steps for stage in recipe.stages] == [2, 2]
        assert recipe.stages[1].rollout == run.stages[1].rollout and recipe.data == run.data
        assert recipe.stages[1].eval.max_tokens == run.stages[1].eval.max_tokens  # lengths, so engines, are the same
        assert [stage.pack_tokens for stage in recipe.stages[1:]] == [stage.pack_tokens for stage in run.stages[1:]]
    for other in (planner(tmp_path, until="sft"), planner(tmp_path, cards=[Card("")])):
        assert not any(step.name.startswith("warm_up") for step in other.scheduler.steps)


def test_distillation_may_go_on_from_models_of_before(tmp_path):
    made = planner(tmp_path, layers_share=0, start={"mla": "/models/distilled"}, source_too=False)
    usual = {step.name for step in planner(tmp_path, layers_share=0).steps()}
    names = {step.name for step in made.scheduler.steps}
    of_source = {f"{kind}source_sft_{seed}" for kind in ("", "score_") for seed in (0, 1)}
    assert names == usual - {"convert_mla", "score_source"} - of_source
    steps = {step.name: step for step in made.scheduler.steps}
    assert (steps["logits_mla"].needs, steps["logits_hybrid"].needs) == ((), ("convert_hybrid",))
    assert "convert_hybrid" in steps["logits_mla"].after and "convert_mla" not in steps["logits_hybrid"].after
    for arm, path in (("mla", "/models/distilled"), ("hybrid", "models/hybrid")):
        steps[f"logits_{arm}"].settle(steps[f"logits_{arm}"])
        assert graph.load_recipe(tmp_path / steps[f"logits_{arm}"].command[4]).model.path == path


def test_steps_given_by_hand_hold(tmp_path):
    made = planner(tmp_path, overrides={"distill": ["stages.layers.steps=70", "stages.logits.steps=90"]})
    assert (made.decide("layers")["steps"], made.decide("logits")["steps"]) == (70, 90)
    seconds = 0.08 * 60 * made.settings.minutes
    assert planner(tmp_path).decide("layers")["steps"] == int(seconds / graph.STEP_S["layers"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--arms", "hybrid,gdn"], "--arms 'hybrid,gdn'"),
        (["--seeds", "0,0"], "--seeds '0,0'"),
        (["--gsm8k", "/no/such/folder"], "/no/such/folder: no such file or folder"),
        (["rlvr:steps=3"], "expected PART:KEY=VALUE"),
        (["--layers-share", "0", "--until", "layers"], "--until layers: with --layers-share 0 there is no such stage"),
        (["--layers-share", "8"], "--layers-share 8: give a part of the time"),
        (["run:stages.rlvr.stepz=3"], "stepz"),
        (["--start", "gdn=models"], "--start 'gdn=models': expected ARM=FOLDER"),
        (["--start", "mla=/no/such/folder"], "/no/such/folder: no such file or folder"),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, capsys, words, expected):
    assert command.main(["--out", str(tmp_path / "out"), "--cards", "cpu", *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out" / "state.json").exists()


def test_a_command_of_its_own(tmp_path):
    words = [sys.executable, ROOT / "benchmarks" / "kimi_linear_135m", "--out", tmp_path, "--cards", "cpu", "--plan"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "run_mla_1" in done.stdout and not (tmp_path / "state.json").exists()


# --- the whole graph --------------------------------------------------------------------------------------------

DISTILL = ["data.held_out_size=3", "stages.layers.more_data.0.held_out_size=2"]
DISTILL += ["stages.logits.more_data.0.held_out_size=2"]
DISTILL += [f"stages.{kind}.{word}" for kind in ("layers", "logits") for word in
            ("steps=2", "warmup_steps=1", "batch_tokens=512", "pack_tokens=512", "max_length=256")]  # fmt: skip
SFT = ["data.held_out_size=3", "stages.sft.steps=2", "stages.sft.batch_size=2", "stages.sft.warmup_steps=1"]
RUN = SFT + [f"stages.rlvr.{word}" for word in
             ("steps=1", "warmup_steps=0", "prompts_per_step=2", "group_size=2", "micro_batch_size=4", "eval.k=2",
              "eval.max_tokens=6", "eval.limit=2", "rollout.engine=transformers", "rollout.workers=1",
              "rollout.max_tokens=6", "rollout.engine_args={}")]  # fmt: skip
TINY = [f"{part}:{word}" for part, words in (("distill", DISTILL), ("source", SFT), ("run", RUN)) for word in words]


@pytest.fixture
def inputs(tmp_path):
    """A tiny Llama and four data sets, as the options that name them."""
    tokenizer = build_tokenizer(TokenizerSection(), [])
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, vocab_size=len(tokenizer), num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, max_position_embeddings=2048, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    words = ["--source", str(tmp_path / "source")]
    for number, name in enumerate(command.DATA):
        for split, count in (("train", 40), ("test", 4)):
            lines = []
            for i in range(count):
                answer = f"{i} + {number} is {i + number}\n#### {i + number}"
                lines.append(json.dumps({"question": f"What is {i} and {number}, {split}?", "answer": answer}) + "\n")
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{split}.jsonl").write_text("".join(lines))
        words += [f"--{name}", str(tmp_path / name)]
    with (tmp_path / "math" / "train.jsonl").open("a") as file:  # a training problem that is a held-out one too
        file.write((tmp_path / "math" / "test.jsonl").read_text().splitlines(keepends=True)[0])
    return words


@pytest.fixture
def here(monkeypatch, ray_local):
    """Steps run in this process, whose imports are paid for, and so do learners. Returns the names of the steps."""
    started = []

    def run_stage(recipe, index, run_dir, start_model, device, resume):
        start = str(Path(start_model).resolve())  # rollout workers work in another folder
        job = StageJob(recipe, index, str(run_dir.path), start, device, 1, resume)
        return Learner.__ray_metadata__.modified_class().run(job)

    def launch(step, log, folder, environment):
        started.append(step.name)
        said = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                if step.command[1] == "-m":
                    done = CliRunner().invoke(app, step.command[3:], catch_exceptions=False)
                    code, text = done.exit_code, done.output
                else:
                    code, text = command.main(step.command[2:]), ""
            except Exception:
                code, text = 1, traceback.format_exc()
        log.write_text(said.getvalue() + text)
        return SimpleNamespace(poll=lambda: code, send=lambda number: None)

    monkeypatch.setattr(pipeline, "_run_stage", run_stage)
    monkeypatch.setattr(command, "launch", launch)
    return started


def test_the_whole_graph_on_tiny_models(inputs, here, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = [*inputs, "--out", str(out), "--cards", "cpu", "--engine", "transformers", "--threads", "1", "--k", "2"]
    words += ["--max-tokens", "6", "--limit", "2", "--sample-seconds", "0.1", "--arms", "hybrid", "--seeds", "0", *TINY]
    words += ["--layers-share", "0.08"]

    # A data set that cannot be read ends the call at once.
    (tmp_path / "svamp").rename(tmp_path / "away")
    (tmp_path / "svamp").mkdir()
    assert command.main([*words, "--until", "sft"]) == 1
    assert here == ["data"] and "svamp has no train.jsonl" in read_state(out)["steps"]["data"]["error"]
    (tmp_path / "svamp").rmdir()
    (tmp_path / "away").rename(tmp_path / "svamp")

    # To the end of SFT; no model can be scored at first, which stops nothing else.
    measure = standalone.evaluate_model

    def all_but_svamp(model, path, *more, **settings):
        if path.endswith("svamp"):
            raise InputError(f"{path}: not today")
        return measure(model, path, *more, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(standalone, "evaluate_model", all_but_svamp)
        assert command.main([*words, "--until", "sft"]) == 1
    states = {name: row["status"] for name, row in read_state(out)["steps"].items()}
    scored = {name for name in states if name.startswith("score")}
    assert scored == {"score_source", "score_source_sft_0", "score_distilled_hybrid", "score_sft_hybrid_0"}
    assert {name for name, status in states.items() if status != "done"} == scored
    assert "svamp" in read_state(out)["steps"]["score_source"]["error"]
    sft = out / "compare/runs/hybrid/seed_0/stages/0_sft/model/model.safetensors"
    scored_first = out / "scores/source_gsm8k.json"  # with the seconds that it took
    before = {path: path.read_bytes() for path in (sft, scored_first)}

    here.clear()
    assert command.main(words) == 0, capsys.readouterr().out
    assert set(here) == {*scored, "run_hybrid_0", "score_rlvr_hybrid_0"}
    # The run went on after its SFT, and what was scored already is not scored again.
    assert {path: path.read_bytes() for path in before} == before

    found = json.loads((out / "results.json").read_text())
    assert {row["status"] for row in found["steps"].values()} == {"done"}
    models = {"source", "source_sft_0", "distilled_hybrid", "sft_hybrid_0", "rlvr_hybrid_0"}
    assert set(found["scores"]) == models
    for sets in found["scores"].values():
        assert set(sets) == {"gsm8k", "svamp", "math500"}
        for row in sets.values():
            low, high = row["held_out_interval"]
            assert low <= row["held_out_accuracy"] <= high and row["n"] == 2 and len(row["avg_at_k_interval"]) == 2
    assert found["scores"]["rlvr_hybrid_0"]["gsm8k"]["run"] == "compare/runs/hybrid/seed_0"
    for kind, stage in found["distillation"]["hybrid"].items():
        assert stage["steps"] == 2 and 500 < stage["tokens"] <= 1024
        assert [row["when"] for row in stage["curve"]] == ["before", "after"]
        assert [row["tokens"] for row in stage["curve"]] == [0, stage["tokens"]]
        assert (stage["texts"] == "samples.jsonl") == (kind == "logits")
        assert found["probes"]["hybrid"][kind]["step_s"] > 0
    assert found["samples"]["rows"] == len((out / "samples.jsonl").read_text().splitlines()) > 0
    stages = found["training"]["hybrid_0"]["stages"]
    assert set(stages) == {"sft", "rlvr"} and set(stages["rlvr"]["gains"]) == {"greedy", "avg"}
    assert all(gain["interval"][0] <= gain["value"] <= gain["interval"][1] for gain in stages["rlvr"]["gains"].values())
    assert found["conversion"]["hybrid"]["perplexity"]["source"] > 1
    assert found["comparison"] is None  # of one arm
    here.clear()
    assert command.main(words) == 0 and here == []
    capsys.readouterr()
    assert command.main(["--status", str(out)]) == 0
    said = capsys.readouterr().out
    assert "run_hybrid_0: done" in said and "rlvr 1/1" in said and "source_sft_0: gsm8k" in said
    assert command.main([*words, "--threads", "2"]) == 2 and "was begun with threads 1" in capsys.readouterr().err


def measured(start, seeds, curve, batch=8, arm="hybrid", name="sft_hybrid_{}"):
    rows = [{"tokens": at, "student_perplexity": value, "teacher_perplexity": 3.0} for at, value in curve]
    scores = {name.format(seed): {"gsm8k": {"held_out_accuracy": x, "avg_at_k": x / 2}} for seed, x in enumerate(seeds)}
    stage = {"batch_tokens": batch, "steps": len(curve), "curve": rows}
    found = {arm: {"layers": None, "logits": stage}}
    return {"settings": {"start": start}, "scores": scores, "distillation": found}


def test_a_call_that_starts_from_another_goes_on_with_its_curve(tmp_path):
    results = [
        measured(None, [0.1, 0.2], [(0, 90.0), (50, 5.0)]),
        measured({}, [0.6], [(0, 95.0), (40, 6.0)], batch=16),
        measured({"hybrid": "distilled"}, [0.3], [(0, 5.0), (30, 4.0)]),
        measured({}, [0.8, 0.4], [(0, 99.0)], arm="mla", name="source_sft_{}"),
        measured({}, [0.5], [(0, 90.0), (20, 7.0), (70, 4.5)]),  # the first way once more
    ]
    (tmp_path / "results").mkdir()
    files = [tmp_path / "results" / f"{number}.json" for number in range(len(results))]
    for file, result in zip(files, results, strict=True):
        file.write_text(json.dumps(result))
    hybrid, wide, mla, again = plot.curves(results)
    assert hybrid.perplexity == [(0, 90.0), (50, 5.0), (80, 4.0)] and wide.perplexity == [(0, 95.0), (40, 6.0)]
    assert {at: [score["held_out_accuracy"] for score in scores] for at, scores in hybrid.tuned.items()} == {
        50: [0.1, 0.2], 80: [0.3]
    }  # fmt: skip
    assert list(wide.tuned) == [40] and not mla.tuned
    assert again.perplexity == [(0, 90.0), (20, 7.0), (70, 4.5)] and list(again.tuned) == [70]
    assert hybrid.label == "hybrid, 2 + 2 steps of 8" and again.label == "hybrid, 3 steps of 8"
    perplexity, tuned = plot.of_source(results)
    assert perplexity == 3.0 and tuned == {"held_out_accuracy": pytest.approx(0.6), "avg_at_k": pytest.approx(0.3)}
    assert command.main(["plot", *map(str, files), str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_other_solutions_are_sampled_than_before(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["sample", "source", "FILE", "gsm8k=gsm8k", "--engine", "transformers", "--max-tokens", "4"]
    rows = {}
    for skip in (0, 3):
        words[2] = f"after_{skip}.jsonl"
        assert command.main([*words, "--skip", str(skip)]) == 0
        rows[skip] = [json.loads(line)["prompt_ids"] for line in Path(words[2]).read_text().splitlines()]
    assert len(rows[0]) > 3 and rows[3] == rows[0][3:]


def test_the_source_is_written_once_to_the_last_bit(inputs, tmp_path):
    assert command.main(["source", str(tmp_path / "source"), str(tmp_path / "copy")]) == 0
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("copy", "source"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template
