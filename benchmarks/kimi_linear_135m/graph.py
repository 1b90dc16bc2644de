"""The steps from the source to the scores: what each needs, its command, and how long it will take.

Seconds were measured on an H100 and an H200 with 16 cores and two H200 with 32, several processes side by side. Times
of both distill stages come from a probe of some steps; the `logits` stage gets all the time that what comes after it
does not need.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kimi_linear_135m.scheduler import Card, Scheduler, Step
from kimi_rl.errors import InputError
from kimi_rl.recipe import Recipe
from kimi_rl.recipe_load import dump_recipe, first_difference, load_recipe, parse_recipe, parse_yaml
from kimi_rl.run_dir import atomic_write_text

HERE = Path(__file__).resolve().parent
NAME = "benchmarks/kimi_linear_135m"
RECIPES = HERE.parents[1] / "recipes"
RUN_RECIPE = RECIPES / "gsm8k_sft_kimi_smollm2_hybrid.yaml"  # of both arms, but for the model
STAGES = ("layers", "logits", "sft", "rlvr")  # what --until takes, in their order
PARTS = ("distill", "source", "run")  # recipes that overrides name
SETS = ("gsm8k", "svamp", "math500")

START_S = 60.0  # a training process: imports, Ray, data, model
DISTILL_START_S = 110.0  # one that distils: a second model, more texts, held-out figures, a group of learners that meet
MEETING = 1.1  # a step of several learners, which wait for each other's gradients, over a step of one
ENGINE_S = 80.0  # a process with a vLLM engine
SFT_S, RLVR_S = 160.0, 600.0  # steps and evaluations of a run's stages; the host's work, so two on a card take as long
UNTUNED_S = {"hybrid": 200.0, "mla": 250.0, "source": 230.0}  # scores of a model whose answers seldom end by themselves
SLACK = 0.05  # of a call's time, left over by the plan
RESULTS_S = 40.0  # for results.json and the comparison, at the end
LAYERS_SHARE = 0.0  # of a call's time; what a start costs buys more in `logits` (docs/distill.md)
STEP_S = {"layers": 0.75, "logits": 0.7}  # where no probe says otherwise
PEAK_GIB = {"layers": 42.0, "logits": 40.0}
RUN_GIB = 43.0  # two took 85 beside each other, with what PyTorch keeps for later
# The stage that --layers-share puts before the recipes' own, with its teacher and data. It keeps the activations of one
# layer alone: so long rows.
LAYERS = {"name": "layers", "match": "layers", "steps": 300, "batch_tokens": 65536, "pack_tokens": 65536,
          "learning_rate": 3e-3, "warmup_steps": 15, "checkpoint_every": 100}  # fmt: skip
# What makes the comparison's recipe a warm-up; engines and packs keep their sizes.
WARM_UP = ["stages.sft.steps=2", "stages.sft.warmup_steps=1", "stages.rlvr.steps=2", "stages.rlvr.warmup_steps=1",
           "stages.rlvr.prompts_per_step=16", "stages.rlvr.eval.limit=64", "stages.rlvr.eval.k=1"]  # fmt: skip
LEAST_S = 30.0  # of a distill stage, however little time is left


@dataclass
class Settings:
    """What was asked. `data`: gsm8k, math, svamp, math500 as `data.path` takes them; `overrides`: part of the recipes
    (`distill`, `source`, `run`) to `KEY=VALUE`s."""

    source: str
    data: dict[str, str]
    out: Path
    minutes: float = 40.0
    cards: list[Card] = field(default_factory=lambda: [Card("")])
    cores: int = 1
    threads: int = 1
    learners: int = 1  # of a distill stage, each on a card
    arms: tuple[str, ...] = ("hybrid", "mla")
    seeds: tuple[int, ...] = (0, 1)
    until: str = "rlvr"
    engine: str = "auto"
    sample_s: float = 90.0
    sample_skip: int = 0
    layers_share: float = LAYERS_SHARE  # of the time, for the `layers` stage; 0: there is none
    k: int = 4
    max_tokens: int = 512
    limit: int | None = None
    scores: bool = True  # False: only what trains, so that a later call scores it
    start: dict[str, str] = field(default_factory=dict)  # arm to the model that is distilled; of others the conversion
    source_too: bool = True  # False: neither SFT nor scores of the source
    overrides: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)  # `decisions` and more, in state.json

    @property
    def kinds(self) -> tuple[str, ...]:
        """The distill stages."""
        return ("layers", "logits") if self.layers_share else ("logits",)

    def learners_for(self, decision: dict[str, Any]) -> int:
        """Those that can divide the steps that were decided, maybe for other cards."""
        return self.learners if decision["rows"] % self.learners == 0 else 1

    @property
    def slots(self) -> int:
        """Processes at a time: their starts are work for the CPU."""
        return max(2, self.cores // 4)

    def reaches(self, stage: str) -> bool:
        return STAGES.index(self.until) >= STAGES.index(stage)

    @property
    def model(self) -> str:
        """The source as every step but the first reads it."""
        folder = Path(self.source)
        return self.source if (folder / "config.json").is_file() else "models/source"


def kimi(*words: object) -> list[str]:
    return [sys.executable, "-m", "kimi_rl.cli", *map(str, words)]


def worker(*words: object) -> list[str]:
    return [sys.executable, str(HERE), *map(str, words)]


def distill_seconds(spent: float) -> float:
    """Of a distill stage whose steps take `spent`: its start, and held-out figures and checkpoints on the way."""
    return DISTILL_START_S + 1.05 * spent


# --- recipes ----------------------------------------------------------------------------------------------------


def distill_recipe(settings: Settings, arm: str, kind: str, decision: dict[str, Any] | None = None) -> Recipe:
    """One stage of recipes/smollm2_convert_ARM.yaml; `decision` as in `Planner.decide`.

    Its steps and their tokens are those that were decided, on however many cards they are made now.
    """
    first = settings.start.get(arm, f"models/{arm}")
    start = first if kind == settings.kinds[0] else f"runs/layers_{arm}/model"
    own = [f"model.path={start}", f"data.path={settings.data['gsm8k']}", f"threads={settings.threads}"]
    own += [f"name={kind}_{arm}"]
    for stage in ("layers", "logits"):
        own += [f"stages.{stage}.teacher={settings.model}"]
        own += [f"stages.{stage}.more_data.0.path={settings.data['math']}"]
    path = RECIPES / f"smollm2_convert_{arm}.yaml"
    tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    common = {key: value for key, value in tree["stages"][0].items() if key not in ("kl", "ce")}
    tree["stages"].insert(0, common | LAYERS)
    recipe = parse_recipe(yaml.safe_dump(tree), [*own, *settings.overrides.get("distill", ())], str(path))
    (stage,) = (stage for stage in recipe.stages if stage.name == kind)
    changes: dict[str, Any] = {}
    if decision:
        steps = decision["steps"]
        changes = {"steps": steps, "warmup_steps": min(stage.warmup_steps, max(1, steps // 10))}
        changes["pack_tokens"] = decision["pack_tokens"]
        changes["batch_tokens"] = decision["rows"] * stage.batch_tokens
        changes["learners"] = settings.learners_for(decision)
        if decision.get("samples"):
            changes["texts"] = "samples.jsonl"
    tree = recipe.model_dump() | {"stages": [stage.model_dump() | changes]}
    return Recipe.model_validate(tree)


def source_recipe(settings: Settings, seed: int) -> Recipe:
    own = [f"model.path={settings.model}", f"data.path={settings.data['gsm8k']}", f"threads={settings.threads}"]
    own += [f"seed={seed}", f"name=source_sft_{seed}"]
    return load_recipe(RECIPES / "gsm8k_sft_smollm2_source.yaml", [*own, *settings.overrides.get("source", ())])


def run_overrides(settings: Settings) -> list[str]:
    """Of every run of the comparison; verdicts side by side are the same verdicts."""
    own = [f"data.path={settings.data['gsm8k']}", f"threads={settings.threads}"]
    return [*own, f"reward.workers={min(6, settings.threads)}", *settings.overrides.get("run", ())]


def comparison_file(settings: Settings) -> dict[str, Any]:
    """recipes/compare_gsm8k_smollm2.yaml with our models and seeds, and without its measurement of decoding."""
    path = RECIPES / "compare_gsm8k_smollm2.yaml"
    tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    base = parse_yaml((RECIPES / tree["base"]).read_text(encoding="utf-8"), tree["base"])
    arms = {arm: {"model.path": f"runs/logits_{arm}/model"} for arm in ("mla", "hybrid")}
    return tree | {"base": base, "arms": arms, "seeds": list(settings.seeds), "efficiency": None}


def run_recipe(settings: Settings, arm: str, seed: int) -> Recipe:
    """The recipe that `kimi-rl compare` gives the run of this arm and seed."""
    own = [f"model.path=runs/logits_{arm}/model", f"seed={seed}", f"name={arm}_seed_{seed}"]
    return load_recipe(RUN_RECIPE, [*run_overrides(settings), *own])


def run_folder(arm: str, seed: int | str) -> str:
    return f"compare/runs/{arm}/seed_{seed}"


# --- the graph --------------------------------------------------------------------------------------------------


class Planner:
    """Makes the steps of `settings`, and decides the distill stages' lengths once they are known to matter."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.scheduler: Scheduler | None = None  # set by whoever runs the steps
        self.decisions: dict[str, dict[str, Any]] = settings.kept.setdefault("decisions", {})

    def steps(self) -> list[Step]:
        s, steps = self.settings, []
        ready = ()
        if s.model != s.source:
            ready = ("source",)
            steps.append(Step("source", worker("source", s.source, s.model), 30, threads=s.threads, makes=s.model))
        steps.append(self._check())
        ready += ("data",)
        for arm in (arm for arm in s.arms if arm not in s.start):
            out, threads = f"models/{arm}", max(1, s.cores // (len(s.arms) + 1))
            command = kimi("convert", s.model, "--arch", arm, "--calibration", s.data["gsm8k"], "--out", out)
            step = Step(f"convert_{arm}", command, 110, ready, threads=threads, makes=f"{out}/convert.json")
            step.settle = lambda step, out=out: self._clear(out)
            steps.append(step)
        probes = self._probes(ready)
        steps += [*probes, *self._warm_ups()]
        for part in range(self.sample_parts):
            file = f"samples_{part}.jsonl"
            command = worker("sample", s.model, file, *self._sets("gsm8k", "math"), "--engine", s.engine)
            command += ["--seconds", str(s.sample_s), "--part", f"{part}/{self.sample_parts}"]
            command += ["--skip", str(s.sample_skip)] if s.sample_skip else []
            step = Step(f"sample_{part}", command, ENGINE_S + s.sample_s, ready, load=0.5, start_s=ENGINE_S, gib=14,
                        threads=s.threads, makes=file)  # fmt: skip
            steps.append(step)
        for kind in s.kinds:
            if s.reaches(kind):
                steps += [self._distill(kind, arm, [step.name for step in probes]) for arm in s.arms]
        if s.reaches("logits"):
            if s.source_too:
                steps.append(self._score("source", s.model, ready, after=self._source_waits_for()))
            steps += [self._score(f"distilled_{a}", f"runs/logits_{a}/model", (f"logits_{a}",)) for a in s.arms]
        if s.reaches("sft"):
            steps += self._tuned(ready)
        return [step for step in steps if s.scores or not step.name.startswith("score_")]

    def _check(self) -> Step:
        """Of all data sets, before anything is made of them."""
        scored = self._sets(*SETS[1:]) if self.settings.scores else []
        step = Step("data", worker("check", "recipes/data.yaml", *scored), 20)
        step.settle = lambda step: self._write(
            "recipes/data.yaml", dump_recipe(distill_recipe(self.settings, self.settings.arms[0], "logits"))
        )
        return step

    def _source_waits_for(self) -> tuple[str, ...]:
        """Its scores. With a card for every run, or one left over where there are none, there is room for them after
        distillation; with fewer only before. Its SFT is over when distillation begins in earnest."""
        s = self.settings
        waits = len(s.cards) >= (len(s.arms) * len(s.seeds) if s.reaches("sft") else len(s.arms) + 1)
        return tuple(f"logits_{arm}" for arm in s.arms) if waits else ()

    @property
    def sample_parts(self) -> int:
        """Processes that sample from the source: one a card."""
        return len(self.settings.cards) if self.settings.reaches("logits") and self.settings.sample_s else 0

    def _probes(self, ready: tuple[str, ...]) -> list[Step]:
        """Of each arm, or of all in one process where there are fewer cards than arms."""
        s = self.settings
        groups = [(arm,) for arm in s.arms] if len(s.cards) >= len(s.arms) else [s.arms]
        made, work_s = [], 45 if s.layers_share else 25
        for arms in groups:
            name = "_".join(("probe", *arms))
            command = worker("probe", "--source", s.model, "--threads", s.threads, *arms)
            step = Step(name, command, 50 + work_s * len(arms), ready, load=0.6, start_s=50, gib=45,
                        threads=s.threads, makes=f"probes/{arms[-1]}.json")  # fmt: skip
            step.settle = lambda step, arms=arms: self._write_probe_recipes(arms)
            made.append(step)
        return made

    def _warm_ups(self) -> list[Step]:
        """On cards, a run of each arm with a few steps, on the model that is yet to be distilled: what engines and
        learners compile is there when the long runs start. Nothing waits for it."""
        s, made = self.settings, []
        for arm in s.arms if s.reaches("rlvr") and s.cards[0].id else ():
            model = s.start.get(arm, f"models/{arm}")
            words = [*run_overrides(s), f"model.path={model}", f"name=warm_up_{arm}", *WARM_UP]
            needs = () if arm in s.start else (f"convert_{arm}",)
            step = Step(f"warm_up_{arm}", [], START_S + 150, needs, load=0.5, start_s=START_S, gib=30,
                        threads=s.threads, makes=f"warm_up/{arm}/model/config.json")  # fmt: skip
            step.settle = lambda step, arm=arm, words=words: self._settle_train(
                step, load_recipe(RUN_RECIPE, words), f"warm_up/{arm}"
            )
            made.append(step)
        return made

    def _distill(self, kind: str, arm: str, probes: list[str]) -> Step:
        s, name = self.settings, f"{kind}_{arm}"
        first = kind == s.kinds[0]
        after = tuple(probes) if first else ()
        before = {a: f"convert_{a}" if first else f"layers_{a}" for a in s.arms if not (first and a in s.start)}
        if kind == "logits":  # all arms are to have got here, so that they get equally many steps
            after += tuple(before.values())
            after += tuple(f"sample_{part}" for part in range(self.sample_parts))
        needs = (before[arm],) if arm in before else ()
        step = Step(name, [], self._distill_seconds(kind), needs, after, load=1.0, start_s=DISTILL_START_S,
                    cards=s.learners, gib=PEAK_GIB[kind], threads=s.threads,
                    makes=f"runs/{name}/model/config.json")  # fmt: skip
        step.settle = lambda step: self._settle_distill(step, kind, arm)
        return step

    def _tuned(self, ready: tuple[str, ...]) -> list[Step]:
        """SFT of the source for each seed; SFT and RLVR of each arm and seed; their scores."""
        s, stopping = self.settings, not self.settings.reaches("rlvr")
        steps = []
        for seed in s.seeds if s.source_too else ():
            name = f"source_sft_{seed}"
            step = Step(name, [], START_S + SFT_S, ready, load=0.6, start_s=START_S, gib=24, threads=s.threads,
                        makes=f"runs/{name}/model/config.json")  # fmt: skip
            step.settle = lambda step, seed=seed, name=name: self._settle_train(
                step, source_recipe(s, seed), f"runs/{name}"
            )
            steps += [step, self._score(name, f"runs/{name}/model", (name,), after=self._source_waits_for())]
        for seed in s.seeds:
            for arm in s.arms:
                folder, name = run_folder(arm, seed), f"{'sft' if stopping else 'run'}_{arm}_{seed}"
                tuned = f"{folder}/stages/0_sft/model"
                made = f"{tuned if stopping else folder + '/model'}/config.json"
                seconds = START_S + SFT_S + (0 if stopping else RLVR_S)
                step = Step(name, [], seconds, (f"logits_{arm}",), load=0.5, start_s=START_S, gib=RUN_GIB,
                            threads=s.threads, makes=made)  # fmt: skip
                step.settle = lambda step, arm=arm, seed=seed, folder=folder: self._settle_train(
                    step, run_recipe(s, arm, seed), folder, *(["--until", "sft"] if stopping else [])
                )
                # The rlvr stage evaluates on GSM8K before and after.
                sets = SETS if stopping else SETS[1:]
                score = self._score(f"sft_{arm}_{seed}", tuned, (name,), sets)
                score.reads = None if stopping else tuned
                steps += [step, score]
                if not stopping:
                    steps.append(self._score(f"rlvr_{arm}_{seed}", f"{folder}/model", (name,), sets))
        return steps

    def _score(
        self, name: str, model: str, needs: tuple[str, ...], sets: tuple[str, ...] = SETS, after: tuple[str, ...] = ()
    ) -> Step:
        s = self.settings
        command = worker("score", model, name, *self._sets(*sets), "--k", s.k, "--max-tokens", s.max_tokens)
        command += ["--engine", s.engine, "--threads", str(s.threads)] + (["--limit", str(s.limit)] if s.limit else [])
        untuned = UNTUNED_S.get(name.removeprefix("distilled_"))
        seconds = ENGINE_S + (untuned or (130 if "gsm8k" in sets else 70))
        made = f"scores/{name}_{sets[-1]}.json"
        return Step(f"score_{name}", command, seconds, needs, after, load=0.4, start_s=ENGINE_S, gib=13,
                    threads=s.threads, makes=made)  # fmt: skip

    def _sets(self, *names: str) -> list[str]:
        return [f"{name}={self.settings.data[name]}" for name in names]

    # --- what is known only later -----------------------------------------------------------------------------

    def _clear(self, folder: str) -> None:
        """A conversion takes no folder that another left half done."""
        shutil.rmtree(self.settings.out / folder, ignore_errors=True)

    def _write_probe_recipes(self, arms: tuple[str, ...]) -> None:
        for arm in arms:
            for kind in self.settings.kinds:
                text = dump_recipe(distill_recipe(self.settings, arm, kind))
                self._write(f"recipes/probe_{kind}_{arm}.yaml", text)

    def _write(self, name: str, text: str) -> None:
        (self.settings.out / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.settings.out / name, text)

    def _settle_train(self, step: Step, recipe: Recipe, folder: str, *more: str) -> None:
        """`kimi-rl train`, which goes on with what is in `folder` already."""
        name, text = f"recipes/{recipe.name}.yaml", dump_recipe(recipe)
        self._write(name, text)
        stored = self.settings.out / folder / "recipe.yaml"
        begun = stored.is_file()
        if begun:
            difference = first_difference(parse_yaml(stored.read_text(), str(stored)), parse_yaml(text, name))
            if difference and difference[0].endswith(".learners"):
                shutil.rmtree(stored.parent)  # a distill stage begun on another number of cards, and not finished
                begun = False
        step.command = kimi("train", name, "--out", folder, "--json", *more, *(["--resume"] if begun else []))

    def _settle_distill(self, step: Step, kind: str, arm: str) -> None:
        s = self.settings
        if kind == "logits":
            self._gather_samples()
        if kind not in self.decisions:
            self.decisions[kind] = self.decide(kind)
        decision = self.decisions[kind]
        step.seconds, step.gib, step.cards = self._distill_seconds(kind), decision["gib"], s.learners_for(decision)
        self._settle_train(step, distill_recipe(s, arm, kind, decision), f"runs/{kind}_{arm}")

    def _gather_samples(self) -> None:
        """samples.jsonl of all parts, and what they took; neither where there are none."""
        out = self.settings.out
        files = sorted(out.glob("samples_*.jsonl"))
        if not files or (out / "samples.jsonl").is_file():
            return
        parts = [json.loads(file.with_suffix(".json").read_text(encoding="utf-8")) for file in files]
        sums = {key: sum(part[key] for part in parts) for key in ("rows", "tokens", "tokens_per_s")}
        found = {"parts": len(parts), **sums, "seconds": max(part["seconds"] for part in parts)}
        self._write("samples.json", json.dumps(found) + "\n")
        self._write("samples.jsonl", "".join(file.read_text(encoding="utf-8") for file in files))

    def _distill_seconds(self, kind: str) -> float:
        """By what was decided; before that `layers` counts with its share of the time, `logits` with the least."""
        if kind in self.decisions:
            found = self.decisions[kind]
            slower = found["rows"] / self.settings.learners_for(found)
            return distill_seconds(found["steps"] * found["step_s"] * slower)
        share = self.settings.layers_share * 60 * self.settings.minutes
        return distill_seconds(share if kind == "layers" else LEAST_S)

    def _measured(self, kind: str) -> dict[str, Any]:
        """step_s, pack_tokens and gib of the slower and larger arm, by the probes; rows; the recipe's own steps."""
        stages = [distill_recipe(self.settings, arm, kind).stages[0] for arm in self.settings.arms]
        found = []
        for arm in self.settings.arms:
            file = self.settings.out / "probes" / f"{arm}.json"
            probe = json.loads(file.read_text()).get(kind) if file.is_file() else None
            found += [probe] if probe else []
        peaks = [probe["peak_gib"] for probe in found if probe["peak_gib"]]
        slower = MEETING if self.settings.learners > 1 else 1.0
        return {
            "step_s": slower * max((probe["step_s"] for probe in found), default=STEP_S[kind]),
            "rows": self.settings.learners,  # that a step has of the recipe's steps, one for each card
            "pack_tokens": min((probe["pack_tokens"] for probe in found), default=stages[0].pack_tokens),
            "gib": 1.1 * max(peaks) + 2 if peaks else PEAK_GIB[kind],
            "most": stages[0].steps,
        }

    def decide(self, kind: str) -> dict[str, Any]:
        """How many steps every arm takes, and the size of its rows.

        Steps that an override sets hold. `layers` takes its share of the time, at most the recipe's steps; a stage
        after which the call ends, and `logits` always, all that the steps after it leave of it.
        """
        found = self._measured(kind)
        step_s, most = found["step_s"], found.pop("most")
        found["samples"] = kind == "logits" and (self.settings.out / "samples.jsonl").is_file()
        if any(word.startswith(f"stages.{kind}.steps=") for word in self.settings.overrides.get("distill", ())):
            return found | {"steps": most}
        if kind == "logits" or self.settings.until == kind:
            most = most if kind == "layers" else 10**6
            steps = self._most_that_fit(kind, found, most)
        else:
            at_once = max(1, len(self.settings.cards) // self.settings.learners)
            rounds = -(-len(self.settings.arms) // at_once)  # arms that share cards take turns
            steps = min(most, int(self.settings.layers_share * 60 * self.settings.minutes / rounds / step_s))
        return found | {"steps": max(steps, min(most, int(LEAST_S / step_s)), 2)}

    def _most_that_fit(self, kind: str, found: dict[str, Any], most: int) -> int:
        """The largest number of steps with which everything ends in time, less some slack."""
        s, scheduler = self.settings, self.scheduler
        assert scheduler is not None
        budget = scheduler.time_left() - SLACK * 60 * s.minutes
        stages = [step for step in scheduler.steps if step.name in {f"{kind}_{arm}" for arm in s.arms}]
        before = [(step.seconds, step.gib) for step in stages]

        def ends(steps: int) -> float:
            for step in stages:
                step.gib, step.seconds = found["gib"], distill_seconds(steps * found["step_s"])
            return max((end for _, end in scheduler.forecast().values()), default=0.0)

        low, high = 0, min(most, int(max(budget, 0) / found["step_s"]) + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if ends(middle) <= budget else (low, middle - 1)
        for step, (seconds, gib) in zip(stages, before, strict=True):
            step.seconds, step.gib = seconds, gib
        return low

    def outlook(self) -> dict[str, tuple[float, float]]:
        """When each step would begin and end, by what is known now: with the steps that would be decided now."""
        for kind in self.settings.kinds:
            if kind not in self.decisions and self.settings.reaches(kind):
                decision = self.decide(kind)
                for step in self.scheduler.steps:
                    if step.name.startswith(f"{kind}_"):
                        step.seconds = distill_seconds(decision["steps"] * decision["step_s"])
                        step.gib = decision["gib"]  # whether arms share a card
        return self.scheduler.forecast()


def check_settings(settings: Settings) -> None:
    """Mistakes that can be seen at once. Raises InputError."""
    if not 0 <= settings.layers_share < 1:
        raise InputError(f"--layers-share {settings.layers_share:g}: give a part of the time, from 0 to less than 1")
    if settings.until == "layers" and not settings.layers_share:
        raise InputError(f"--until {settings.until}: with --layers-share 0 there is no such stage")
    for part in settings.overrides:
        if part not in PARTS:
            raise InputError(f"override {part}:...: unknown part; give one of {', '.join(PARTS)}")
    for arm in settings.arms:
        for kind in settings.kinds:
            distill_recipe(settings, arm, kind)
        for seed in settings.seeds:
            run_recipe(settings, arm, seed)
    for seed in settings.seeds:
        source_recipe(settings, seed)

