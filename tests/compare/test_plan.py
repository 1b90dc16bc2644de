"""Comparison files: what they become, and what is wrong with bad ones."""

from pathlib import Path

import pytest
import yaml

from kimi_rl.compare.fairness import arm_costs, check_parameters, check_settings
from kimi_rl.compare.plan import load_plan, ratio_pattern
from kimi_rl.errors import InputError

BASE = {
    "name": "base",
    "model": {"size": "tiny"},
    "data": {"task": "arithmetic"},
    "stages": [{"kind": "sft", "steps": 4}, {"kind": "rlvr", "steps": 3, "prompts_per_step": 2, "group_size": 2}],
}


def plan_of(folder, more=(), **fields):
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump({"name": "test", "base": BASE, **fields}, sort_keys=False))
    return load_plan(path, more)


def test_arms_and_seeds_become_whole_recipes(tmp_path):
    arms = {
        "mla": {"model.arch": "mla"},
        "even": {"ratio": "1:1"},
        "fast": {"stages": {"rlvr": {"learning_rate": 1e-3}}},
        "again": {"seed_offset": 100},
    }
    plan = plan_of(tmp_path, ["stages.rlvr.steps=5"], arms=arms, seeds=[3, 1], overrides={"data.train_size": 50})
    assert [(run.arm, run.seed) for run in plan.runs] == [(arm, seed) for seed in (3, 1) for arm in arms]
    assert plan.reference == "mla" and plan.stage == "rlvr"
    by_name = {run.recipe.name: run.recipe for run in plan.runs}
    assert len(by_name) == 8
    assert by_name["mla_seed_3"].model.arch == "mla" and by_name["mla_seed_3"].seed == 3
    assert by_name["even_seed_1"].model.layer_types == ["linear_attention", "full_attention"] * 2
    assert by_name["fast_seed_1"].stages[1].learning_rate == 1e-3
    assert by_name["again_seed_1"].seed == 101
    for recipe in by_name.values():
        assert recipe.stages[1].steps == 5 and recipe.data.train_size == 50
    assert plan.runs[0].folder == "runs/mla/seed_3"


def test_base_may_be_a_file_and_a_recipe_alone_compares_hybrid_with_mla(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    plan = plan_of(tmp_path, base="recipe.yaml", reference="hybrid")
    assert plan.reference == "hybrid" and plan.runs[0].recipe.stages[0].steps == 4
    alone = load_plan(tmp_path / "recipe.yaml")
    assert {run.arm for run in alone.runs} == {"mla", "hybrid"} and alone.file.seeds == [0, 1, 2]
    assert alone.file.name == "base"


@pytest.mark.parametrize("ratio,layers,letters", [
    ("3:1", 8, "KKKMKKKM"), ("1:1", 4, "KMKM"), ("7:1", 8, "KKKKKKKM"), ("0:1", 2, "MM"), ("1:2", 3, "KMM"),
])  # fmt: skip
def test_ratios(ratio, layers, letters):
    found = ratio_pattern(ratio, layers)
    assert "".join("K" if kind == "linear_attention" else "M" for kind in found) == letters


ARMS = {"mla": {"model.arch": "mla"}}


@pytest.mark.parametrize("fields,words", [
    ({"arms": {"a": {}}}, ["arms", "found 1 arm,", "at least 2"]),
    ({"arms": {"a b": {}, "c": {}}}, ["'a b'"]),
    ({"arms": {"a": {"model.arhc": "mla"}, "c": {}}}, ["arms.a", "model.arhc", "did you mean `model.arch`?"]),
    ({"arms": {"a": {"model.arch": "mlaa"}, "c": {}}}, ["arms.a", "model.arch", "did you mean mla?"]),
    ({"arms": {**ARMS, "b": {"ratio": "7:1"}}}, ["arms.b.ratio", "every 8 layers", "has 4"]),
    ({"arms": {**ARMS, "b": {"ratio": 61}}}, ["arms.b.ratio", "found 61", "in quotes"]),
    ({"arms": {**ARMS, "b": {"ratio": "1:0"}}}, ["arms.b.ratio", "at least one MLA"]),
    ({"arms": {**ARMS, "b": {"ration": "1:1"}}}, ["arms.b", "`ration`", "`ratio`"]),
    ({"arms": {**ARMS, "b": {"output_gate": False}}}, ["arms.b.output_gate", "not supported", "always apply"]),
    ({"arms": {**ARMS, "b": {"rope": True}}}, ["arms.b.rope", "not supported", "rotary"]),
    ({"arms": {**ARMS, "b": {"gdn": True}}}, ["arms.b.gdn", "not supported", "DeltaNet"]),
    ({"arms": {**ARMS, "b": {"seed": 3}}}, ["arms.b.seed", "seeds"]),
    ({"arms": {**ARMS, "b": {"seed_offset": "x"}}}, ["arms.b.seed_offset", "'x'"]),
    ({"arms": {**ARMS, "b": {"stages.rlvr.name": "other"}}}, ["same stages", "other"]),
    ({"seeds": []}, ["seeds", "at least 1 entry"]),
    ({"seeds": [1, 2, 1]}, ["seeds", "seed 1 stands 2 times"]),
    ({"seeds": [-1]}, ["seeds.0", "at least 0"]),
    ({"reference": "none"}, ["reference", "'none'", "mla, hybrid"]),
    ({"stage": "rl"}, ["stage", "'rl'", "sft, rlvr"]),
    ({"arms": {**ARMS, "b": {"stages.rlvr.eval": None}}}, ["stage rlvr", "eval: null"]),
    ({"stage": "sft", "overrides": {"stages.sft.eval": None}}, ["stage sft", "eval: null"]),
    ({"thresholds": [50]}, ["thresholds.0", "less than 1"]),
    ({"primary": "last"}, ["primary", "auc, final or gain"]),
    ({"sedes": [1]}, ["unknown key `sedes`", "`seeds`"]),
    ({"efficiency": {"contexts": [1]}}, ["efficiency.contexts", "`efficiency.context`"]),
    ({"base": "missing.yaml"}, ["base", "missing.yaml", "no such file"]),
    ({"base": {**BASE, "stages": []}}, ["base", "stages", "at least 1 entry"]),
    ({"overrides": {"stages.rlvr.stepz": 3}}, ["stages.rlvr.stepz", "steps"]),
])  # fmt: skip
def test_mistakes_are_named_in_one_line(tmp_path, fields, words):
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, **fields)
    message = str(caught.value)
    assert "\n" not in message and "comparison.yaml" in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("text,word", [("", "expected a mapping"), ("- 1", "expected a mapping"), ("a: [", "line 1")])
def test_files_that_are_no_comparison(tmp_path, text, word):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=word):
        load_plan(path)
    with pytest.raises(InputError, match="no such file"):
        load_plan(tmp_path / "none.yaml")


def test_presets_are_equally_large_in_every_ratio(tmp_path):
    arms = {"mla": {"model.arch": "mla"}, "hybrid": {}, "even": {"ratio": "1:1"}, "seven": {"ratio": "7:1"}}
    plan = plan_of(tmp_path, arms=arms, overrides={"model.size": "small"})
    costs = arm_costs(plan)
    check = check_parameters(plan, costs)
    assert check.equal
    assert [costs[arm].layers for arm in arms] == ["M" * 8, "KKKMKKKM", "KMKMKMKM", "KKKKKKKM"]
    counts = [cost.parameters for cost in costs.values()]
    assert max(counts) / min(counts) < 1.02


def test_unequal_sizes_are_refused_unless_allowed(tmp_path):
    arms = {"mla": {"model.arch": "mla"}, "wide": {"model.overrides.intermediate_size": 512}}
    plan = plan_of(tmp_path, arms=arms)
    with pytest.raises(InputError, match=r"arms.wide has \+[0-9.]+% of the parameters of mla .*at most 2 %"):
        check_parameters(plan, arm_costs(plan))
    plan = plan_of(tmp_path, arms=arms, allow_unequal=True)
    assert not check_parameters(plan, arm_costs(plan)).equal


def test_settings_that_differ_are_named(tmp_path):
    arms = {"a": {}, "b": {"stages.rlvr.learning_rate": 1e-3}, "c": {"seed_offset": 5}}
    checks = {check.what: check for check in check_settings(plan_of(tmp_path, arms=arms))}
    stages = checks["optimizer, steps and batch sizes"]
    assert not stages.equal and stages.found == "b: stages.1.learning_rate is 0.001, not 0.0001"
    order = checks["data and data order"]
    assert not order.equal and "c: seed is 5, not 0" in order.found
    assert checks["reward"].equal and checks["threads"].equal


def test_shipped_comparisons_load():
    found = sorted((Path(__file__).parents[2] / "recipes").glob("compare_*.yaml"))
    assert found
    for path in found:
        plan = load_plan(path)
        assert len(plan.file.seeds) >= 3, path
        if all(plan.recipe(arm).model.path is None for arm in plan.file.arms):  # else the models have to be made first
            assert check_parameters(plan, arm_costs(plan)).equal, path
        assert all(check.equal for check in check_settings(plan)), path
