"""The report of runs that are complete, going on, failed, damaged or empty."""

import json
import re
import time
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest

from kimi_rl.recipe_load import dump_recipe, parse_recipe
from kimi_rl.report import render_text_summary, write_report
from kimi_rl.report.charts import running_mean, stage_charts
from kimi_rl.report.samples import choose
from kimi_rl.run_dir import RunDir

RECIPE = dump_recipe(
    parse_recipe(
        "name: demo\nseed: 7\ndata: {task: arithmetic}\n"
        "stages: [{kind: sft, steps: 3}, {kind: rlvr, steps: 60}]"
    )
)


def sft_row(step: int, **more) -> dict:
    return {"type": "train", "stage": "sft", "kind": "sft", "step": step, "steps_total": 3,
            "loss": 2.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_s": 500.0, "step_s": 0.5,
            "mean_token_accuracy": 0.5, "time": time.time(), **more}  # fmt: skip


def rlvr_row(step: int, **more) -> dict:
    return {"type": "train", "stage": "rlvr", "kind": "rlvr", "step": step, "steps_total": 60,
            "reward": step / 100, "accuracy": step / 100, "completion_length": 20.5, "truncated_share": 0.1,
            "entropy": 0.5, "kl": 0.001, "loss": 0.01, "grad_norm": 0.4, "learning_rate": 1e-4,
            "mismatch_kl": 1e-5 * step, "mismatch_mean_abs": 1e-5, "mismatch_max_abs": 1e-3,
            "mismatch_ratio_p01": 0.99,
            "mismatch_ratio_p99": 1.01, "is_truncated_share": 0.0, "is_ratio_mean": 1.0,
            "verdict_correct": step, "verdict_wrong": 100 - step, "verdict_no_answer": 28,
            "verdict_timeout": 1, "verdict_crashed": 0, "zero_std_share": 0.3,
            "tokens_per_s": 1000.0 + step, "wait_s": 1.0, "sync_s": 0.1,
            "learner_s": 0.9, "step_s": 2.0, "workers_restarted": 1, "time": time.time(), **more}  # fmt: skip


def eval_row(stage: str, step: int, when: str, accuracy: float, **more) -> dict:
    return {"type": "eval", "stage": stage, "kind": stage, "step": step, "when": when, "n": 100, "k": 0,
            "held_out_accuracy": accuracy, "held_out_se": 0.04, "time": time.time(), **more}  # fmt: skip


def samples() -> list[dict]:
    return [
        {"question": "1+1=? <b>", "completion": "2</td></script><script>alert('x')</script>", "gold": "2",
         "parsed": "2", "status": "correct", "reason": "equal", "reward": 1.0},
        {"question": "2+2=?", "completion": "y" * 4000, "gold": "4", "parsed": None, "status": "no_answer",
         "reason": "no \\boxed{}", "reward": 0.0},
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.create(tmp_path / "run", RECIPE)


@pytest.fixture
def complete(run) -> RunDir:
    run.write_environment({"python": "3.12.1", "gpus": ["H100"], "versions": {"torch": "2.13", "vllm": None}})
    rows = [eval_row("sft", 0, "before", 0.0), *(sft_row(s) for s in (1, 2, 3))]
    rows += [eval_row("sft", 3, "after", 0.25), *(rlvr_row(s) for s in range(1, 61))]
    rows += [eval_row("rlvr", 30, "during", 0.4)]
    rows += [eval_row("rlvr", 60, "after", 0.5, k=4, avg_at_k=0.45, avg_at_k_se=0.02)]
    for row in rows:
        run.append_metrics(row)
    for step in (1, 60):
        run.write_rollouts("rlvr", step, samples())
    run.write_rollouts("sft_eval_after", 3, samples())
    stages = [{"name": "sft", "seconds": 61}, {"name": "rlvr", "seconds": 200}]
    run.write_summary({"status": "complete", "stages": stages})
    return run


class Page(HTMLParser):
    """What a browser makes of a page: tags, visible text, scripts."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside = tag
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += " " + data

    def figures(self) -> list[dict]:
        text = re.match(r"const CHARTS = (.*);\n", self.scripts[-1])[1]
        return json.loads(text)


def page(run: RunDir) -> Page:
    path = write_report(run.path)
    assert path == run.path / "report.html"
    return Page(path.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------- the page


def test_complete_run(complete):
    html = page(complete)
    for shown in (
        "demo", "complete", "seed 7", "0.0% → 25.0% ± 4.0%", "25.0% → 50.0% ± 4.0%", "+25.0 pp",
        "avg@4 45.0% ± 2.0%", "n = 100", "4 min 21 s", "6.0e-04", "60 timeout", "Rollout workers restarted",
        "H100", "not installed", "held_out_size: null", "step 60 of 60",
    ):  # fmt: skip
        assert shown in html.text, shown


def test_the_page_is_self_contained_and_its_scripts_are_whole(complete):
    html = page(complete)
    assert html.links == []
    assert len(html.scripts) == 2 and "plotly.js v" in html.scripts[0][:200]
    assert html.scripts[1].rstrip().endswith('addEventListener("beforeprint", () => elements.forEach(draw));')


def test_every_figure_is_valid_plotly_and_has_its_place(complete):
    html = page(complete)
    figures = html.figures()
    assert html.text.count("Throughput") == 2
    assert html.tags.count("figure") == len(figures) == 22
    for figure in figures:
        go.Figure(figure)  # raises for a property that plotly does not know


def test_samples_are_escaped_cut_and_labelled(complete):
    html = page(complete)
    assert "2</td></script><script>alert('x')</script>" in html.text
    assert "y" * 1500 + "… (2,500 more characters)" in html.text
    assert "y" * 1501 not in html.text
    for shown in ("step 1 ", "step 60 ", "after the stage", "no answer", "no \\boxed{}"):
        assert shown in html.text


def test_names_cannot_break_out_of_the_script(run):
    run.append_metrics(sft_row(1, stage="</script><script>alert(1)</script>"))
    html = page(run)
    assert len(html.scripts) == 2
    assert "</script><script>alert(1)</script>" in html.text


def test_failed_run_gives_the_reason(run):
    run.append_metrics(rlvr_row(1))
    run.write_summary({"status": "failed", "error": "mismatch KL 0.2 > 0.02 <for 3 steps>", "stages": []})
    html = page(run)
    assert "failed" in html.text and "mismatch KL 0.2 > 0.02 <for 3 steps>" in html.text
    assert "step 1 of 60" in html.text


def test_running_run_shows_what_there_is(run):
    run.append_metrics(eval_row("sft", 0, "before", 0.1))
    run.append_metrics(sft_row(1))
    html = page(run)
    assert "running" in html.text and "before: 10.0% ± 4.0%" in html.text and "not started" in html.text
    run.append_metrics(eval_row("sft", 2, "during", 0.2))
    assert "so far (step 2)" in page(run).text


def test_silent_run_is_called_interrupted(run):
    run.append_metrics(sft_row(1, time=time.time() - 7200))
    assert "No new row for 2 h 00 min" in page(run).text
    run.write_environment({})  # a resumed run that has no new row yet
    assert "running" in page(run).text


def test_run_without_anything_but_a_recipe(run):
    html = page(run)
    assert "No metrics yet." in html.text and "not started" in html.text and html.figures() == []


def test_empty_folder(tmp_path):
    html = page(RunDir(tmp_path))
    assert tmp_path.name in html.text and "no recipe.yaml" in html.text


def test_damage_becomes_a_warning(complete):
    (complete.path / "summary.json").write_text("{")
    (complete.path / "environment.json").write_text("nope")
    complete.rollouts_path("rlvr", 60).write_bytes(b"PAR1")
    html = page(complete)
    for shown in ("summary.json: not JSON", "environment.json: not JSON", "step_000060.parquet: cannot be"):
        assert shown in html.text
    assert "50.0% ± 4.0%" in html.text and "step 1 " in html.text
    with open(complete.metrics_path, "ab") as file:
        file.write(b"garbage\n")
    html = page(complete)
    assert "line 68 is no JSON object" in html.text and "50.0% ± 4.0%" in html.text
    complete.recipe_path.write_text("a: [")
    assert "recipe.yaml, line 1" in page(complete).text


def test_rows_that_a_resume_recorded_twice_count_once(run):
    for accuracy in (0.1, 0.3):
        run.append_metrics(sft_row(1, mean_token_accuracy=accuracy))
        run.append_metrics({"type": "note", "stage": "sft", "step": 0, "text": "3 samples dropped"})
    html = page(run)
    assert html.text.count("3 samples dropped") == 1
    accuracy = next(f for f in html.figures() if f["data"][0]["name"] == "token accuracy")
    assert accuracy["data"][0]["y"] == [0.3]


# ---------------------------------------------------------------------------------------------- charts


def traces(charts, title: str) -> dict[str, dict]:
    return {t["name"]: t for chart in charts if chart.title == title for t in chart.figure["data"]}


def test_accuracy_chart_has_error_bars_and_all_three_curves():
    after = eval_row("rlvr", 9, "after", 0.6, k=4, avg_at_k=0.5, avg_at_k_se=0.03)
    evals = [eval_row("rlvr", 0, "before", 0.2), after]
    found = traces(stage_charts("rlvr", [rlvr_row(1), rlvr_row(2)], evals, {}), "Accuracy")
    assert set(found) == {"train", "held-out, greedy", "held-out, avg@4"}
    greedy, sampled = found["held-out, greedy"], found["held-out, avg@4"]
    assert (greedy["x"], greedy["y"], greedy["error_y"]["array"]) == ([0, 9], [0.2, 0.6], [0.04, 0.04])
    assert (sampled["x"], sampled["y"], sampled["error_y"]["array"]) == ([9], [0.5], [0.03])


def test_mismatch_chart_is_logarithmic_and_carries_the_recipes_bar():
    rows = [rlvr_row(1), rlvr_row(2)]
    charts = stage_charts("rlvr", rows, [], {"mismatch": {"max_kl": 0.02}})
    assert traces(charts, "Mismatch: KL")["bar"]["y"] == [0.02, 0.02]
    assert next(c for c in charts if c.title == "Mismatch: KL").figure["layout"]["yaxis"]["type"] == "log"
    rows[0]["mismatch_kl"] = 0.0  # has no logarithm
    charts = stage_charts("rlvr", rows, [], {"mismatch": {"max_kl": None}})
    assert set(traces(charts, "Mismatch: KL")) == {"KL k3"}
    assert "type" not in next(c for c in charts if c.title == "Mismatch: KL").figure["layout"]["yaxis"]


def test_stacked_charts_leave_out_what_never_happened():
    charts = stage_charts("rlvr", [rlvr_row(5)], [], {})
    assert list(traces(charts, "Verdicts")) == ["correct", "wrong", "no answer", "timeout"]
    assert {name: t["y"] for name, t in traces(charts, "Step time").items()} == {
        "waiting for rollouts": [1.0], "weight sync": [0.1], "learner": [0.9]
    }  # fmt: skip
    assert traces(stage_charts("sft", [sft_row(1)], [], {}), "Step time")["step"]["y"] == [0.5]


def test_charts_without_figures_are_left_out_and_gaps_stay_gaps():
    rows = [{"step": 1, "loss": 1.0, "kl": None}, {"step": 2}, {"step": 3, "loss": 0.5}]
    charts = stage_charts("rlvr", rows, [], {"mismatch": {"max_kl": 0.02}})
    assert [chart.title for chart in charts] == ["Loss"]
    assert traces(charts, "Loss")["loss"]["y"] == [1.0, None, 0.5]
    assert stage_charts("sft", [], [], {}) == []


def test_long_noisy_curves_get_a_running_mean():
    charts = stage_charts("rlvr", [rlvr_row(s) for s in range(1, 61)], [], {})
    assert list(traces(charts, "Reward")) == ["reward, single steps", "reward (mean of 5)"]
    assert running_mean([1.0, 3.0, None, 5.0], 2) == [1.0, 2.0, 3.0, 5.0]
    assert running_mean([None, 1.0], 1) == [None, 1.0]


# --------------------------------------------------------------------------------------------- samples


def test_choose_takes_right_and_wrong_of_different_problems_and_kinds():
    pairs = [("a", "correct"), ("a", "correct"), ("b", "correct"), ("a", "correct"), ("a", "wrong"),
             ("b", "wrong"), ("c", "wrong"), ("d", "timeout")]  # fmt: skip
    rows = [{"question": q, "status": s, "completion": str(i)} for i, (q, s) in enumerate(pairs)]
    assert [row["completion"] for row in choose(rows)] == ["0", "2", "1", "4", "7", "5"]
    assert choose([{"reward": 1.0}, {"reward": 0.0}, {"reward": None}]) == [
        {"reward": 1.0}, {"reward": 0.0}, {"reward": None}
    ]  # fmt: skip


def test_chat_prompts_are_shown_as_turns(run):
    run.write_rollouts("rlvr", 1, [{"prompt": [{"role": "user", "content": "Hi"}], "completion": "x"}])
    run.append_metrics(rlvr_row(1))
    assert "user: Hi" in page(run).text


# ------------------------------------------------------------------------------------------ terminal


def test_text_summary(complete):
    text = render_text_summary(complete.path)
    assert text.splitlines()[:3] == [
        "demo: complete (seed 7, data seed 0, stages took 4 min 21 s)",
        "  sft   sft   step 3/3  held-out 0.0% ± 4.0% -> 25.0% ± 4.0%  (+25.0 pp)  1 min 01 s",
        "  rlvr  rlvr  step 60/60  held-out 25.0% ± 4.0% -> 50.0% ± 4.0%  (+25.0 pp)"
        "  avg@4 45.0% ± 2.0%  3 min 20 s",
    ]
    assert "  Mismatch KL: 6.0e-04 (worst step; median 3.1e-04)" in text.splitlines()


def answers(right: int, of: int = 100) -> list[dict]:
    return [
        {"question": f"{i}?", "status": "correct" if i < right else "wrong", "solved_share": 0.25 * (i < right)}
        for i in range(of)
    ]


def test_what_a_stage_changed_has_an_interval_of_its_own(complete):
    """Between answers to the same problems, where both evaluations' are on disk: here SFT's last and RLVR's last."""
    evals = [row for row in complete.read_metrics() if row["type"] == "eval" and row["when"] == "after"]
    assert [row["stage"] for row in evals] == ["sft", "rlvr"]
    for row in evals:
        accuracy = round(100 * row["held_out_accuracy"])
        complete.append_metrics(row | {"k": 4, "avg_at_k": row["held_out_accuracy"] / 4, "avg_at_k_se": 0.01})
        complete.write_rollouts(f"{row['stage']}_eval_after", row["step"], answers(accuracy))
    text = render_text_summary(complete.path).splitlines()[2]
    # 25 of 100 changed from wrong to right: the mean change is 25 points, its standard error sqrt(19.75) / 100.
    assert "25.0% ± 4.0% -> 50.0% ± 4.0%  (+25.0 pp, 95 %: +16.2 to +33.8)" in text
    assert "avg@4 6.2% ± 1.0% -> 12.5% ± 1.0%  (+6.2 pp, 95 %: +3.3 to +9.2)" in text
    shown = page(complete).text
    assert "+25.0 pp , 95 %: +16.2 to +33.8" in shown and "+6.2 pp, 95 %: +3.3 to +9.2" in shown

    # Answers to other problems, none at all, or a damaged file: the change alone.
    after = evals[1]["step"]
    for rows in (answers(50, of=99), [row | {"question": "other"} for row in answers(50)]):
        complete.write_rollouts("rlvr_eval_after", after, rows)
        assert "(+25.0 pp)" in render_text_summary(complete.path)
    complete.rollouts_path("rlvr_eval_after", after).write_bytes(b"nothing that can be read")
    assert "(+25.0 pp)" in render_text_summary(complete.path)


def test_text_summary_of_a_failed_and_of_an_empty_run(run):
    assert render_text_summary(run.path).splitlines()[1] == "  sft   sft   step 0/3"
    run.write_summary({"status": "failed", "error": "the engine died"})
    assert render_text_summary(run.path).splitlines()[:2] == [
        "demo: failed (seed 7, data seed 0)",
        "  the engine died",
    ]


def test_tokens_by_age_only_where_rollouts_run_ahead():
    assert not [c for c in stage_charts("rlvr", [rlvr_row(1, staleness_tokens={"0": 9})], [], {}) if "age" in c.title]
    rows = [rlvr_row(1, staleness_tokens={"0": 9}), rlvr_row(2, staleness_tokens={"0": 2, "1": 7})]
    charts = stage_charts("rlvr", rows, [], {})
    ages = {name: trace["y"] for name, trace in traces(charts, "Tokens by age").items()}
    assert ages == {"0 old": [9, 2], "1 old": [None, 7]}


def distill_rows() -> list[dict]:
    common = {"stage": "distill", "kind": "distill", "time": time.time()}
    rows = [
        {"type": "eval", "step": step, "when": when, "student_perplexity": student, "teacher_perplexity": 4.0,
         "layer_errors": errors, **common}
        for step, when, student, errors in (
            (0, "before", 900.0, [0.9, 0.5]), (5, "during", 60.0, [0.4, 0.2]), (10, "after", 5.5, [0.2, 0.1])
        )
    ]  # fmt: skip
    return rows + [
        {"type": "train", "step": step, "loss": 1.0 / step, "layer_error_mean": 1.0 / step, "layer_error_max": 2.0,
         "layer_errors": [2.0, 0.1], **common}
        for step in (1, 5, 10)
    ]  # fmt: skip


def test_distill_charts_show_perplexities_and_the_layers_before_and_after():
    rows = distill_rows()
    evals, train = rows[:3], rows[3:]
    charts = {chart.title: chart.figure for chart in stage_charts("distill", train, evals, {})}
    assert list(charts)[:2] == ["Perplexity", "Error by layer"] and "Error of the layers" in charts
    assert "KL to the teacher" not in charts and "Accuracy" not in charts
    assert [trace["y"] for trace in charts["Perplexity"]["data"]] == [[900.0, 60.0, 5.5], [4.0, 4.0, 4.0]]
    bars = charts["Error by layer"]["data"]
    assert [(bar["name"], bar["y"]) for bar in bars] == [("step 0", [0.9, 0.5]), ("step 10", [0.2, 0.1])]
    for figure in charts.values():
        go.Figure(figure)


def test_a_distilled_model_is_summed_up_by_its_perplexity(tmp_path):
    recipe = "data: {task: arithmetic}\nstages: [{kind: distill, teacher: a/b, match: layers, steps: 10}]"
    run = RunDir.create(tmp_path / "run", dump_recipe(parse_recipe(recipe)))
    for row in distill_rows():
        run.append_metrics(row)
    (line,) = [line for line in render_text_summary(run.path).splitlines() if "distill" in line]
    assert "perplexity 900.000 -> 5.500 (teacher 4.000)" in line and "held-out" not in line
    page = write_report(run.path).read_text()
    assert "distill: held-out perplexity" in page and "teacher 4.000" in page
