"""From run folders to figures, conclusions, page, CSV and PNG."""

import csv
import json

import numpy as np
import pytest
from stand_in_runs import PROBLEMS, chance, make_run, recipe

from kimi_rl.compare.analysis import compare_arms, conclusion, measured
from kimi_rl.compare.curves import on_one_axis, read_stages, records_of, same_problems
from kimi_rl.compare.fairness import check_records
from kimi_rl.compare.page import figure, write_csv, write_png
from kimi_rl.compare.panels import curve_panels
from kimi_rl.compare.statistics import paired_difference
from kimi_rl.run_dir import RunDir

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Stages by (arm, seed), of a hybrid that ends 30 points higher."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for arch in ("mla", "hybrid"):
        for seed in SEEDS:
            make_run(recipe(arch, seed), root / f"{arch}{seed}")
            found[arch, seed] = read_stages(RunDir(root / f"{arch}{seed}"))
    return found


def test_curves_of_one_run(curves):
    stage = curves["hybrid", 0]["rlvr"]
    assert stage.kind == "rlvr" and stage.train["step"].tolist() == list(range(1, 13))
    # Twelve steps of 2 s; the half second of an evaluation is taken out again.
    assert stage.train["seconds"].tolist() == pytest.approx([2.0 * step for step in range(1, 13)])
    assert stage.train["tokens"].tolist() == [100 * step for step in range(1, 13)]
    assert stage.evals["step"].tolist() == [0, 4, 8, 12] and stage.evals["tokens"].tolist() == [0, 400, 800, 1200]
    assert stage.solved.shape == (PROBLEMS, 4)
    assert stage.solved.mean(axis=0) == pytest.approx(stage.evals["held_out_accuracy"])
    assert curves["hybrid", 0]["sft"].train["tokens"].tolist() == [1000, 2000, 3000, 4000]


def test_axes(curves):
    runs = [curves["mla", seed]["rlvr"] for seed in SEEDS]
    x, y = on_one_axis(runs, "train", "accuracy", "step")
    assert x.tolist() == list(range(1, 13)) and y.shape == (3, 12)
    x, y = on_one_axis([runs[0], curves["hybrid", 0]["rlvr"]], "train", "accuracy", "tokens")
    assert x[0] == 150 and x[-1] == 1200  # the hybrid reads less: no curve is drawn beyond its end
    assert on_one_axis(runs, "train", "unheard_of", "step") is None
    assert on_one_axis(runs, "evals", "avg_at_k", "step") is None


def test_a_real_difference_is_found(curves):
    own = {key: stages["rlvr"] for key, stages in curves.items()}
    [found] = compare_arms(own, ["mla", "hybrid"], "mla", primary="auc", thresholds=[0.5, 0.99])
    figures = {entry["key"]: entry for entry in found["figures"]}
    solved = {key: stage.solved for key, stage in own.items()}
    by_hand = np.mean([solved["hybrid", s][:, -1].mean() - solved["mla", s][:, -1].mean() for s in SEEDS])
    assert figures["final"]["value"] == pytest.approx(by_hand)
    assert figures["final"]["arm_mean"] - figures["final"]["reference_mean"] == pytest.approx(by_hand)
    assert figures["auc"]["pairs"] == 3 and figures["auc"]["smallest_p"] == 0.25
    assert found["shown"] and found["conclusion"].startswith("hybrid is higher than mla in mean held-out accuracy")
    assert "3 pairs of seeds, permutation p = 0.25, the smallest possible" in found["conclusion"]
    assert figures["step_to_0.5"]["reached"]["of"] == 3 and figures["step_to_0.5"]["value"] < 0
    unreached = figures["step_to_0.99"]
    assert unreached["reached"]["reference"] == 0 and unreached["reference_mean"] == 12
    assert unreached["interval"] is None, "what a run would have needed is not known"
    starts = np.mean([solved["hybrid", s][:, 0].mean() - solved["mla", s][:, 0].mean() for s in SEEDS])
    assert figures["gain"]["value"] == pytest.approx(by_hand - starts)
    json.dumps(found)


def test_equal_arms_show_no_difference(tmp_path):
    own = {}
    for arm, offset in (("a", 0), ("b", 50)):
        for seed in SEEDS:
            make_run(recipe("mla", seed + offset), tmp_path / f"{arm}{seed}")
            own[arm, seed] = read_stages(RunDir(tmp_path / f"{arm}{seed}"))["rlvr"]
    [found] = compare_arms(own, ["a", "b"], "a", primary="final", thresholds=[])
    assert not found["shown"]
    assert found["conclusion"].startswith("No difference shown between b and a in held-out accuracy at the end")
    assert "More seeds alone would hardly show" in found["conclusion"]
    wide = conclusion("b", "a", "x", paired_difference(np.array([0.3, -0.1, 0.2])), 0.95)
    assert wide.startswith("No difference shown between b and a in x: +13.3 pp") and "about 22 pairs of seeds" in wide
    [same] = compare_arms(
        {**{("a", s): own["a", s] for s in SEEDS}, **{("c", s): own["a", s] for s in SEEDS}},
        ["a", "c"], "a", primary="auc", thresholds=[],
    )  # fmt: skip
    assert same["conclusion"].startswith("No difference shown") and "they are equal" in same["conclusion"]


def test_one_pair_says_nothing_and_only_whole_pairs_count(curves):
    own = {key: stages["rlvr"] for key, stages in curves.items() if key not in (("hybrid", 0), ("mla", 2))}
    [found] = compare_arms(own, ["mla", "hybrid"], "mla", primary="auc", thresholds=[])
    assert found["seeds"] == [1] and found["conclusion"].startswith("Nothing can be said")
    [none] = compare_arms({}, ["mla", "hybrid"], "mla", primary="auc", thresholds=[])
    assert none["figures"] == [] and "0 complete pairs" in none["conclusion"]


def test_more_arms_are_judged_more_strictly(curves):
    own = {key: stages["rlvr"] for key, stages in curves.items()}
    own |= {("third", seed): own["hybrid", seed] for seed in SEEDS}
    two = compare_arms(own, ["mla", "hybrid", "third"], "mla", primary="auc", thresholds=[])
    [one] = compare_arms(own, ["mla", "hybrid"], "mla", primary="auc", thresholds=[])
    assert len(two) == 2 and two[0]["level"] == 0.975 and "97.5 %" in two[0]["conclusion"]
    assert two[0]["decided"]["interval"][0] < one["decided"]["interval"][0]


def test_other_problems_are_not_paired(curves):
    stage, other = curves["mla", 0]["rlvr"], curves["mla", 1]["rlvr"]
    assert same_problems([stage, other])
    changed = type(other)(other.kind, other.train, other.evals, other.solved, other.questions[::-1])
    assert not same_problems([stage, changed])


def test_records_show_what_was_not_the_same(curves, tmp_path):
    make_run(recipe("mla", 0), tmp_path / "mla")
    make_run(recipe("hybrid", 0), tmp_path / "hybrid")
    make_run(recipe("hybrid", 9), tmp_path / "other")
    records = {
        (arm, 0): records_of(run, read_stages(run))
        for arm, run in ((name, RunDir(tmp_path / name)) for name in ("mla", "hybrid", "other"))
    }
    checks = {check.what: check for check in check_records(records, "mla")}
    assert checks["sft: tokens of every step"].equal and checks["rlvr: evaluation prompts"].equal
    order = checks["rlvr: prompts of every step"]
    assert not order.equal and order.found == "not the same as mla: other at seed 0"
    del records["other", 0]
    assert all(check.equal for check in check_records(records, "mla"))


def test_measured_speed(curves):
    found = measured(curves, ["mla", "hybrid"])
    assert found["hybrid"]["rlvr"]["tokens"] == {"mean": 1200.0, "sd": 0.0}
    assert found["mla"]["rlvr"]["learner tokens/s"]["mean"] == 150.0


def test_panels_page_and_files(curves, tmp_path):
    panels = curve_panels(curves, ["mla", "hybrid"], "mla")
    titles = {(panel.section, panel.title, panel.x_label) for panel in panels}
    assert {("rlvr", "Held-out accuracy, greedy", x) for x in (
        "step", "tokens read by the learner", "seconds of training")} <= titles  # fmt: skip
    assert ("rlvr", "Mismatch of trainer and engine: KL (k3)", "step") in titles
    assert ("sft", "Loss", "step") in titles and ("rlvr", "Loss", "step") not in titles
    write_csv(tmp_path / "curves.csv", panels)
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    mean = [float(r["y"]) for r in rows if r["section"] == "rlvr" and r["panel"] == "Train accuracy" and
            r["x_axis"] == "step" and r["line"] == "hybrid" and r["kind"] == "mean"]  # fmt: skip
    by_hand = [np.mean([chance("hybrid", s, step / 12, 0.3) for s in SEEDS]) for step in range(1, 13)]
    assert mean == pytest.approx(by_hand, abs=1e-6)
    for panel in panels:
        drawn = figure(panel)
        listed = {(r["line"], r["kind"]) for r in rows if r["panel"] == panel.title and r["section"] == panel.section}
        for line in panel.lines:
            assert (line.arm, "mean") in listed and (line.arm, "pointwise low") in listed
        assert json.loads(json.dumps(drawn)) == drawn
        assert any(trace.get("fill") == "toself" for trace in drawn["data"])
    write_png(tmp_path / "curves.png", panels[:2], "test")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
