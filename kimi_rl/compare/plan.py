"""The comparison file: a base recipe, arms (named overrides of it) and seeds, checked before anything runs."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kimi_rl.errors import InputError
from kimi_rl.recipe import NonNegative, Positive, Recipe, RLVRStage, Section
from kimi_rl.recipe_load import parse_recipe, parse_yaml, validate

# Variants that an arm might ask for and that no configuration of the model gives.
_UNSUPPORTED = {
    "output_gate": "transformers' KimiLinearDeltaAttention and vLLM always apply the output gate",
    "rope": "the MLA layers of transformers' KimiLinearForCausalLM and of vLLM have no rotary embedding",
    "gdn": "transformers' KimiLinearForCausalLM has KDA layers only; a Gated DeltaNet layer is another model class",
}
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_RATIO = re.compile(r"(\d+):(\d+)")


class EfficiencySection(Section):
    """What `kimi-rl bench decode` measures of each arm once the runs are done."""

    context: list[Positive] = Field(min_length=1, description="Context lengths, in tokens.")
    tokens: Positive = Field(32, description="Tokens decoded per measurement.")
    repeats: Positive = 3
    batch: Positive = Field(1, description="Sequences decoded at once.")
    engine: Literal["auto", "transformers", "vllm"] = "auto"


class Comparison(Section):
    """A comparison file."""

    name: str = Field("compare", pattern=r"^[A-Za-z0-9_.-]+$")
    base: str | dict[str, Any] = Field(description="Recipe file (relative to this file), or a recipe itself.")
    overrides: dict[str, Any] = Field(default_factory=dict, description="Overrides of the base for every arm.")
    arms: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: {"mla": {"model.arch": "mla"}, "hybrid": {"model.arch": "hybrid"}},
        description="name: overrides (`model.arch: mla`), `ratio: '7:1'` (KDA to MLA layers), or `seed_offset`.",
    )
    seeds: list[NonNegative] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    reference: str | None = Field(None, description="The arm that the others are compared with; unset: the first.")
    stage: str | None = Field(None, description="The stage whose curves are compared; unset: the last RLVR stage.")
    primary: Literal["auc", "final", "gain"] = Field(
        "auc", description="What decides: mean held-out accuracy over the stage, at its end, or its gain in the stage."
    )
    thresholds: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=lambda: [0.5], description="Held-out accuracies whose first crossing is timed."
    )
    allow_unequal: bool = Field(False, description="Compare arms whose parameter counts differ by over 2 %.")
    context: list[Positive] = Field(
        default_factory=lambda: [4096, 32768, 131072], description="Lengths at which state and KV bytes are stated."
    )
    efficiency: EfficiencySection | None = Field(None, description="Unset: decoding is not measured.")

    @field_validator("arms")
    @classmethod
    def _arm_names(cls, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if len(arms) < 2:
            raise ValueError(f"found {len(arms)} arm{'s' * (len(arms) != 1)}, a comparison needs at least 2")
        for name in arms:
            if not _ARM_NAME.fullmatch(name):
                raise ValueError(f"found arm {name!r}; a name is letters, digits, `_`, `.` or `-`")
        return arms

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        for seed in seeds:
            if seeds.count(seed) > 1:
                raise ValueError(f"seed {seed} stands {seeds.count(seed)} times; the same seed gives the same run")
        return seeds

    @model_validator(mode="after")
    def _known_reference(self) -> Comparison:
        if self.reference is not None and self.reference not in self.arms:
            raise ValueError(f"reference: no arm {self.reference!r}; arms: {', '.join(self.arms)}")
        return self


@dataclass(frozen=True)
class Run:
    """One run to make: an arm at a seed. `folder` is relative to the comparison's folder."""

    arm: str
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> str:
        return f"runs/{self.arm}/seed_{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A checked comparison: its file with the base recipe in it, the compared stage, and every run, the arms of one
    seed after another."""

    file: Comparison
    reference: str
    stage: str
    runs: list[Run]

    def recipe(self, arm: str) -> Recipe:
        """The arm's recipe at its first seed."""
        return next(run.recipe for run in self.runs if run.arm == arm)


def load_plan(path: Path | str, overrides: Sequence[str] = ()) -> Plan:
    """Read a comparison file, or a recipe: that one is compared as `hybrid` against `mla` with seeds 0, 1, 2.

    `overrides` (`dotted.key=value`) change the base recipe, on top of the file's own.

    Raises:
        InputError: one line that names the file and the field or arm.
    """
    path = Path(path)
    tree = _read(path, "comparison")
    if not isinstance(tree, dict):
        raise InputError(f"comparison {path}: expected a mapping with `base`, `arms` and `seeds`")
    if "stages" in tree:
        tree = {"name": str(tree.get("name", "compare")), "base": path.name}
    return make_plan(validate(Comparison, tree, f"comparison {path}"), path, overrides)


def make_plan(file: Comparison, path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The runs of a comparison; `path` is where its file lies. Raises InputError as `load_plan`."""
    where = f"comparison {path}"
    tree, source = file.base, f"{where}: base"
    if isinstance(tree, str):
        source = f"recipe {path.parent / tree}"
        tree = _read(path.parent / tree, f"{where}: base: recipe")
    text = json.dumps(tree)  # JSON is YAML without its surprises
    parse_recipe(text, where=source)  # its own mistakes are named by its own name
    common = [*flatten(file.overrides), *overrides]
    runs: dict[str, list[Run]] = {}
    for arm, entry in file.arms.items():
        own, offset = _arm_overrides(text, common, arm, entry, where)
        for seed in file.seeds:
            recipe = _parse(
                text, [*common, *own, f"seed={seed + offset}", f"name={arm}_seed_{seed}"], where, arm
            )
            runs.setdefault(arm, []).append(Run(arm, seed, recipe))
    stage = _compared_stage(file, [made[0].recipe for made in runs.values()], where)
    return Plan(
        file=file.model_copy(update={"base": tree}),
        reference=file.reference or next(iter(file.arms)),
        stage=stage,
        runs=[runs[arm][index] for index in range(len(file.seeds)) for arm in runs],
    )


def flatten(mapping: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested or dotted overrides as `dotted.key=value`."""
    found = []
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            found += flatten(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={json.dumps(value)}")
    return found


def ratio_pattern(ratio: Any, layers: int) -> list[str]:
    """`layers` layer types that repeat `a` KDA layers and `b` MLA layers, for "a:b". Raises ValueError."""
    match = _RATIO.fullmatch(ratio) if isinstance(ratio, str) else None
    if not match or int(match[2]) < 1:
        raise ValueError(
            f"found {ratio!r}, expected KDA:MLA layers in quotes, such as '3:1', with at least one MLA layer"
        )
    linear, full = int(match[1]), int(match[2])
    if layers % (linear + full):
        raise ValueError(
            f"{ratio} repeats every {linear + full} layers, and the model has {layers}; set "
            "model.overrides.num_hidden_layers to a multiple"
        )
    block = ["linear_attention"] * linear + ["full_attention"] * full
    return block * (layers // len(block))


def _read(path: Path, what: str) -> Any:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), f"{what} {path}")
    except FileNotFoundError:
        raise InputError(f"{what} {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be read: {error.strerror or error}") from None


def _parse(text: str, overrides: Sequence[str], where: str, arm: str) -> Recipe:
    place = f"{where}: arms.{arm}"
    try:
        return parse_recipe(text, overrides, where=place)
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(place) else f"{place}: {message}") from None


def _arm_overrides(
    text: str, common: Sequence[str], arm: str, entry: dict[str, Any], where: str
) -> tuple[list[str], int]:
    """An arm's own overrides, and what is added to its seeds."""
    entry = dict(entry)
    place = f"{where}: arms.{arm}"
    for word, reason in _UNSUPPORTED.items():
        if word in entry:
            raise InputError(f"{place}.{word}: not supported: {reason}")
    for word, instead in (("seed", "list it in `seeds`"), ("name", "an arm's name is its key in `arms`")):
        if word in entry:
            raise InputError(f"{place}.{word}: cannot be set by an arm; {instead}")
    for word in entry:  # a misspelt word of the arm's own, before it is taken for a part of the recipe
        near = difflib.get_close_matches(word, ("ratio", "seed_offset"), n=1, cutoff=0.75)
        if near and word not in ("ratio", "seed_offset"):
            raise InputError(f"{place}: unknown key `{word}`, did you mean `{near[0]}`?")
    offset = entry.pop("seed_offset", 0)
    if type(offset) is not int or offset < 0:
        raise InputError(f"{place}.seed_offset: found {offset!r}, expected a whole number of at least 0")
    ratio = entry.pop("ratio", None)
    own = flatten(entry)
    if ratio is not None:
        from kimi_rl.model.presets import SIZES

        model = _parse(text, [*common, *own, "model.layer_types=null"], where, arm).model
        layers = model.overrides.get("num_hidden_layers", SIZES.get(model.size, {}).get("num_hidden_layers"))
        if isinstance(layers, int) and layers > 0:  # otherwise the model's own check says what is wrong
            try:
                own.append(f"model.layer_types={json.dumps(ratio_pattern(ratio, layers))}")
            except ValueError as error:
                raise InputError(f"{place}.ratio: {error}") from None
    return own, offset


def _compared_stage(file: Comparison, recipes: Sequence[Recipe], where: str) -> str:
    names = [[stage.name for stage in recipe.stages] for recipe in recipes]
    if any(other != names[0] for other in names):
        raise InputError(f"{where}: arms: every arm must have the same stages, found {names}")
    name = file.stage
    if name is None:
        rlvr = [stage.name for stage in recipes[0].stages if isinstance(stage, RLVRStage)]
        name = (rlvr or names[0])[-1]
    if name not in names[0]:
        raise InputError(f"{where}: stage: no stage {name!r}; stages: {', '.join(names[0])}")
    if any(stage.name == name and stage.eval is None for recipe in recipes for stage in recipe.stages):
        raise InputError(f"{where}: stage {name} has `eval: null`, but is compared by its evaluations; give it some")
    return name
