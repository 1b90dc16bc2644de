"""What the arms of a comparison have in common, and what they have not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kimi_rl.compare.plan import Plan
from kimi_rl.errors import InputError
from kimi_rl.model.cost import sequence_bytes, token_flops
from kimi_rl.model.presets import describe, recipe_config
from kimi_rl.recipe import Recipe

MOST_APART = 0.02  # of the reference's parameters, embeddings left out

# Recipe keys that say how a run is made, by the question a reader asks.
_SETTINGS = {
    "optimizer, steps and batch sizes": ("stages", "precision"),
    "data and data order": ("data", "tokenizer", "seed"),
    "reward": ("reward",),
    "threads": ("threads",),
}


@dataclass(frozen=True)
class Check:
    """One thing that should be the same for all arms. `found` says what differs, or what was compared."""

    what: str
    equal: bool
    found: str


@dataclass(frozen=True)
class ArmCost:
    """What an arm costs by its configuration. `parameters` without embeddings; FLOPs of a forward pass per token at
    the training length; `bytes_at`: memory of one sequence by context length (bfloat16 cache)."""

    parameters: int
    parameters_total: int
    parameters_active: int
    layers: str
    flops_per_token: float
    flops_length: int
    bytes_at: dict[int, dict[str, int]]


def arm_costs(plan: Plan) -> dict[str, ArmCost]:
    """The cost of every arm."""
    return {arm: _cost(plan.recipe(arm), plan.file.context) for arm in plan.file.arms}


def _cost(recipe: Recipe, context: list[int]) -> ArmCost:
    config = recipe_config(recipe)
    counts = describe(config)
    length = max(
        stage.rollout.max_tokens if stage.kind == "rlvr" else stage.max_length for stage in recipe.stages
    )
    kinds = {"linear_attention": "K", "full_attention": "M"}
    return ArmCost(
        parameters=counts["total"] - counts["embedding"],
        parameters_total=counts["total"],
        parameters_active=counts["active"],
        layers="".join(kinds[kind] for kind in config.layer_types),
        flops_per_token=token_flops(config, length).forward,
        flops_length=length,
        bytes_at={n: asdict(sequence_bytes(config, n)) for n in context},
    )


def check_parameters(plan: Plan, costs: dict[str, ArmCost]) -> Check:
    """Parameter counts of the arms, within 2 % of the reference's. Raises InputError unless `allow_unequal`."""
    reference = costs[plan.reference].parameters
    apart = {arm: cost.parameters / reference - 1 for arm, cost in costs.items()}
    worst = max(apart, key=lambda arm: abs(apart[arm]))
    counts = ", ".join(f"{arm} {cost.parameters:,}" for arm, cost in costs.items())
    equal = abs(apart[worst]) <= MOST_APART
    if not equal and not plan.file.allow_unequal:
        raise InputError(
            f"comparison {plan.file.name}: arms.{worst} has {apart[worst]:+.1%} of the parameters of {plan.reference} "
            f"({counts}, embeddings left out), at most 2 % is fair; set model.overrides.intermediate_size, or "
            "allow_unequal: true"
        )
    return Check("parameters within 2 %", equal, f"{counts}; at most {abs(apart[worst]):.2%} apart")


def check_settings(plan: Plan) -> list[Check]:
    """What the recipes of the arms say, seed by seed."""
    checks = []
    for what, keys in _SETTINGS.items():
        differing: dict[str, None] = {}
        for run in plan.runs:
            twin = next(r for r in plan.runs if r.arm == plan.reference and r.seed == run.seed)
            theirs, ours = (r.recipe.model_dump(include=set(keys)) for r in (twin, run))
            for key in _differences(theirs, ours):
                differing[f"{run.arm}: {key}"] = None
        found = "; ".join(differing) if differing else "the same in every recipe"
        checks.append(Check(what, not differing, found))
    return checks


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Dotted keys at which two plain values differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found
            for key in dict.fromkeys([*one, *other])
            for found in _differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            found
            for index, (a, b) in enumerate(zip(one, other, strict=True))
            for found in _differences(a, b, f"{path}.{index}")
        ]
    return [] if one == other else [f"{path} is {other!r}, not {one!r}"]


def check_records(records: dict[tuple[str, int], dict[str, list]], reference: str) -> list[Check]:
    """What the runs really did, from their records: for each (arm, seed) by name of a quantity, a list of values.

    Runs that are missing are not compared; a quantity that no two arms have at one seed is left out.
    """
    names = list(dict.fromkeys(name for record in records.values() for name in record))
    checks = []
    for name in names:
        compared, differing = 0, []
        for (arm, seed), record in records.items():
            twin = records.get((reference, seed), {})
            if arm == reference or name not in record or name not in twin:
                continue
            compared += 1
            if record[name] != twin[name]:
                differing.append(f"{arm} at seed {seed}")
        if compared:
            found = f"not the same as {reference}: {', '.join(differing)}" if differing else (
                f"checked in the records of {compared} pair{'s' * (compared != 1)} of runs"
            )
            checks.append(Check(name, not differing, found))
    return checks
