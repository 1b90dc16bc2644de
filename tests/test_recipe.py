"""The recipe's rules, their wording, overrides, and the way back to YAML."""

from pathlib import Path

import pytest

from kimi_rl.errors import InputError
from kimi_rl.recipe_load import dump_recipe, first_difference, load_recipe, parse_recipe, parse_yaml

BASE = """
name: base
data: {task: arithmetic, params: {digits: 2}}
stages:
- {kind: sft, steps: 10}
- {kind: rlvr, steps: 5}
- {kind: distill, steps: 5, teacher: some/model, match: layers}
"""


def message(*overrides: str, text: str = BASE) -> str:
    with pytest.raises(InputError) as caught:
        parse_recipe(text, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


# --------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages.0.batch_size=30", "stages.0.micro_batch_size=8"],
         "stages.0: batch_size (30) must be a multiple of micro_batch_size (8): 30 % 8 = 6"),
        (["stages.0.warmup_steps=11"], "stages.0: warmup_steps (11) must not exceed steps (10)"),
        (["stages.1.batch_size=60"], "stages.1: group_size (8) must divide batch_size (60): 60 % 8 = 4"),
        (["stages.1.batch_size=64"],
         "stages.1: batch_size (64) must equal prompts_per_step (16) x group_size (8) = 128"),
        (["stages.1.updates_per_step=3"],
         "updates_per_step (3) must divide prompts_per_step (16) x group_size (8) = 128: 128 % 3 = 2"),
        (["stages.1.updates_per_step=2", "stages.1.micro_batch_size=48"],
         "micro_batch_size (48) must divide the completions of one update (128 / updates_per_step 2 = 64)"),
        (["stages.1.epsilon_high=0.1"], "stages.1: epsilon_high (0.1) must not be below epsilon (0.2)"),
        (["stages.1.name=sft"], "stages: the name 'sft' stands 2 times; give each its own `name`"),
        (["stages.2.batch_tokens=100", "stages.2.pack_tokens=64", "stages.2.max_length=64"],
         "stages.2: batch_tokens (100) must be a multiple of pack_tokens (64): 100 % 64 = 36"),
        (["stages.2.max_length=20000"], "stages.2: max_length (20000) must not exceed pack_tokens (16384)"),
        (["stages.2.log_every=30"], "stages.2: checkpoint_every (100) must be a multiple of log_every (30)"),
        (["stages.2.ce=0.5"], "stages.2: ce has no meaning with match: layers; take it out, or set match: logits"),
        (["stages.2.train=all"], "stages.2: train: all needs match: logits"),
        (["stages.2.match=logits", "stages.2.kl=0", "stages.2.ce=0"], "stages.2: kl and ce are both 0"),
        (["data.task="], "data: needs exactly one of `task` and `path`, found neither"),
        (["data.task=stack", "data.path=x"], "data: needs exactly one of `task` and `path`, found both"),
    ],
)  # fmt: skip
def test_rules_between_fields_give_the_numbers(overrides, expected):
    assert expected in message(*overrides)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.1.group_size=1", "stages.1.group_size: found 1, expected at least 2"),
        ("stages.1.steps=0", "stages.1.steps: found 0, expected at least 1"),
        ("stages.0.steps=2.5", "stages.0.steps: found 2.5, expected a whole number"),
        ("stages.1.eval.k=-1", "stages.1.eval.k: found -1, expected at least 0"),
        ("stages.1.rollout.temperature=0", "stages.1.rollout.temperature: found 0, expected more than 0"),
        ("stages.1.rollout.top_p=1.5", "stages.1.rollout.top_p: found 1.5, expected at most 1"),
        ("stages.0.learning_rate=fast", "stages.0.learning_rate: found 'fast', expected a number"),
        ("stages.0.learning_rate=.nan", "stages.0.learning_rate: found nan, expected a finite number"),
        ("stages.1.mask_truncated=maybe", "stages.1.mask_truncated: found 'maybe', expected true or false"),
        ("stages.1.rollout.engine=vlm", "expected auto, transformers or vllm (did you mean vllm?)"),
        ("reward.extract=[boxd]", "reward.extract.0: found 'boxd', expected boxed, hash or answer"),
        ("stages=[]", "stages: found a list of 0, expected at least 1 entry"),
        ("stages.1.loss_type=k15", "loss_type k15 takes rewards unscaled: set scale_rewards to none, found group"),
        ("reward.kind=mth", "unknown 'mth'; use one of math, exact, integer, choice or an import path"),
        ("name=a b", "name: found 'a b', expected letters, digits"),
        ("stages.0=3", "stages.0: found 3, expected a mapping with a `kind`: sft, distill or rlvr"),
        ("stages.1.kind=rlvx", "stages.1.kind: found 'rlvx', expected sft, distill or rlvr (did you mean rlvr?)"),
        ("data=", "data: found nothing, expected a mapping"),
    ],
)
def test_field_errors_say_what_was_found_and_expected(override, expected):
    assert expected in message(override)


def test_missing_fields():
    line = message(text="data: {task: a}\nstages: [{steps: 1}, {kind: sft}]")
    assert "stages.0: `kind` is missing, expected sft, distill or rlvr" in line
    assert "stages.1.steps: missing, expected a whole number" in line
    assert "stages: missing, expected a list" in message(text="data: {task: a}")
    assert "data: missing, expected a mapping with `task`" in message(text="stages: [{kind: sft, steps: 1}]")


def test_unknown_keys_name_the_nearest_one_without_the_union_tag():
    line = message(text="data: {task: a}\nstages: [{kind: rlvr, steps: 2, group_sise: 4}]\nsedd: 1")
    assert "unknown key `stages.0.group_sise`, did you mean `stages.0.group_size`?" in line
    assert "unknown key `sedd`, did you mean `seed`?" in line
    assert "(known keys: task, path" in message(
        text="data: {task: a, zzz: 1}\nstages: [{kind: sft, steps: 2}]"
    )


def test_at_most_five_errors_and_a_count_of_the_rest():
    keys = "\n".join(f"unheard_{i}: 1" for i in range(7))
    line = message(text=BASE + keys)
    assert line.count("unknown key") == 5
    assert line.endswith("; and 2 more")


# ---------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2", "line 2, column 1: key `seed` stands twice, first in line 1"),
        ("data: {task: a, task: b}", "line 1, column 17: key `task` stands twice"),
        ("a: [1", "line 1"),
        ("a: b: c", "line 1, column 5"),
        ("", "recipe: empty, expected a mapping"),
        ("- 1", "found a list of 1, expected a mapping"),
        ("1: x", "key 1 is not text: put it in quotes"),
        ("a: &x [*x]", "an anchor that contains itself"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_broken_yaml(text, expected):
    assert expected in message(text=text)


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(InputError, match="not UTF-8 text"):
        load_recipe(tmp_path / "latin.yaml")


def test_file_and_overrides_together(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(BASE)
    recipe = load_recipe(path, ["seed=3", "stages.rlvr.learning_rate=1e-3"])
    assert (recipe.seed, recipe.stages[1].learning_rate, recipe.name) == (3, 0.001, "base")
    with pytest.raises(InputError, match="recipe .*r.yaml: seed: found -1"):
        load_recipe(path, ["seed=-1"])


# ------------------------------------------------------------------------------------------- overrides


def test_overrides_by_index_by_name_and_into_absent_sections():
    recipe = parse_recipe(
        BASE, ["stages.0.steps=7", "stages.rlvr.steps=9", "stages.rlvr.rollout.top_p=0.9", "reward.workers=2"]
    )
    assert (recipe.stages[0].steps, recipe.stages[1].steps) == (7, 9)
    assert (recipe.stages[1].rollout.top_p, recipe.reward.workers) == (0.9, 2)


def test_overrides_apply_in_order_and_reach_free_mappings():
    recipe = parse_recipe(BASE, ["data.params.digits=3", "data.params.digits=4", "model.overrides.a.b=1e-6"])
    assert recipe.data.params == {"digits": 4}
    assert recipe.model.overrides == {"a": {"b": 1e-6}}


def test_text_fields_take_the_value_as_it_stands():
    recipe = parse_recipe(BASE, ["name=12", "data.instruction=Answer: {x} @", "model.path=null"])
    assert (recipe.name, recipe.data.instruction, recipe.model.path) == ("12", "Answer: {x} @", None)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("modle.path=1", "unknown key `modle`, did you mean `model`?"),
        ("stages.rlvr.stepz=1", "unknown key `stages.rlvr.stepz`, did you mean `stages.rlvr.steps`?"),
        ("stages.0.group_size=4", "unknown key `stages.0.group_size`"),
        ("stages.1.rollout.temprature=1", "did you mean `stages.1.rollout.temperature`?"),
        ("stages.rlv.steps=1", "no stage 'rlv', did you mean `stages.rlvr`?"),
        ("stages.5.steps=1", "`stages` has 3 entries, numbered from 0"),
        ("seed.x=1", "`seed` is not set and has no part `x`"),
        ("name.x=1", "`name` is 'base' and has no part `x`"),
        ("seed", "expected dotted.key=value"),
        ("=1", "expected dotted.key=value"),
        ("data..task=a", "expected dotted.key=value"),
        ("seed=[1", "override 'seed', line 1"),
    ],
)
def test_bad_overrides(override, expected):
    assert expected in message(override)


def test_an_override_does_not_leak_through_a_yaml_alias():
    text = """
data: {task: a}
stages:
- {kind: sft, steps: 1, rollout: &r {max_tokens: 8}}
- {kind: rlvr, steps: 1, rollout: *r}
"""
    recipe = parse_recipe(text, ["stages.rlvr.rollout.max_tokens=99"])
    assert [stage.rollout.max_tokens for stage in recipe.stages] == [8, 99]


def test_overriding_the_data_source_switches_it():
    switched = parse_recipe(BASE, ["data.path=openai/gsm8k"]).data
    assert (switched.path, switched.task, switched.params) == ("openai/gsm8k", None, {})
    back = parse_recipe(dump_recipe(parse_recipe(BASE, ["data.path=x"])), ["data.task=stack"]).data
    assert (back.path, back.task) == (None, "stack")
    assert parse_recipe(BASE, ["data.task=stack"]).data.params == {}
    assert parse_recipe(BASE, ["data.params.depth=3", "data.task=stack"]).data.params == {"depth": 3}
    assert parse_recipe(BASE, ["data.task=arithmetic"]).data.params == {"digits": 2}


def test_overriding_the_model_source_switches_it():
    scratch = BASE + "model: {size: small, arch: mla, overrides: {hidden_size: 64}}"
    model = parse_recipe(scratch, ["model.path=some/model"]).model
    assert (model.path, model.size, model.arch, model.overrides) == ("some/model", "tiny", "hybrid", {})
    from_path = BASE + "model: {path: some/model}"
    model = parse_recipe(from_path, ["model.size=small"]).model
    assert (model.path, model.size) == (None, "small")


# ------------------------------------------------------------------------------------------ the way back


def test_dump_loads_back_equal_and_shows_defaults():
    text = """
name: "12"
data:
  task: a
  params: {text: '1e-3', number: 1e-3, date: 2020-01-01, quoted: "yes", flag: yes, tall: "a\\nb"}
stages:
- {kind: sft, steps: 3, learning_rate: 1e-5}
- {kind: rlvr, steps: 3, mismatch: {max_kl: null}}
"""
    recipe = parse_recipe(text)
    assert recipe.data.params == {
        "text": "1e-3", "number": 0.001, "date": "2020-01-01", "quoted": "yes", "flag": True, "tall": "a\nb"
    }  # fmt: skip
    dumped = dump_recipe(recipe)
    assert parse_recipe(dumped) == recipe
    assert parse_yaml(dumped, "dump")["stages"][1]["group_size"] == 8
    assert dump_recipe(parse_recipe(dumped)) == dumped


def test_first_difference():
    a = parse_yaml(dump_recipe(parse_recipe(BASE)), "a")
    b = parse_yaml(dump_recipe(parse_recipe(BASE, ["stages.1.rollout.top_p=0.5"])), "b")
    assert first_difference(a, a) is None
    assert first_difference(a, b) == ("stages.1.rollout.top_p", 1.0, 0.5)
    assert first_difference({"x": 1}, {"x": True}) == ("x", 1, True)
    assert first_difference({"x": [1]}, {"x": [1, 2]}) == ("x", [1], [1, 2])
    assert first_difference({}, {"y": 2}) == ("y", None, 2)


def test_shipped_recipes_load():
    recipes = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    if not recipes:
        pytest.skip("no recipes in this checkout")
    for path in recipes:
        if path.name.startswith("compare_"):  # comparison files: tests/compare/test_plan.py
            continue
        recipe = load_recipe(path)
        assert parse_recipe(dump_recipe(recipe)) == recipe, path


@pytest.mark.parametrize("name", ["smollm2_convert", "gsm8k_sft_kimi_smollm2"])
def test_the_arms_of_the_converted_model_differ_in_its_folder_alone(name):
    folder = Path(__file__).parents[1] / "recipes"
    hybrid, mla = (load_recipe(folder / f"{name}_{arch}.yaml") for arch in ("hybrid", "mla"))
    assert mla.model.path == hybrid.model.path.replace("hybrid", "mla") != hybrid.model.path
    mla.name, mla.model.path = hybrid.name, hybrid.model.path
    assert mla == hybrid
    kinds = [(stage.kind, getattr(stage, "match", None)) for stage in hybrid.stages]
    assert kinds in ([("distill", "logits")] * 2, [("sft", None), ("rlvr", None)])


def test_the_source_gets_the_sft_of_its_conversions():
    folder = Path(__file__).parents[1] / "recipes"
    names = ("smollm2_source", "kimi_smollm2_hybrid")
    source, hybrid = (load_recipe(folder / f"gsm8k_sft_{name}.yaml") for name in names)
    assert (source.stages, source.data) == (hybrid.stages[:1], hybrid.data)
    assert source.stages[0].eval is None


@pytest.mark.parametrize("name", ["arithmetic", "gsm8k", "math"])
def test_the_arms_of_the_kimi_recipes_differ_in_the_architecture_alone(name):
    folder = Path(__file__).parents[1] / "recipes"
    hybrid, mla = (load_recipe(folder / f"{name}_sft_kimi_{arch}.yaml") for arch in ("hybrid", "mla"))
    assert hybrid.model.arch == "hybrid" and mla.model.arch == "mla"
    assert mla.name == f"{name}_sft_kimi_mla"
    mla.name, mla.model.arch = hybrid.name, hybrid.model.arch
    assert mla == hybrid
    assert hybrid.stages[-1].loss_type == "k15"
