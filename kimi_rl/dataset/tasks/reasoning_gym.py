"""`reasoning_gym/NAME`: the procedural data sets of the `reasoning-gym` package.

Parameters are those of the data set (reasoning-gym's configuration class of it), but for `seed` and `size`: these are
`data.seed` and `data.train_size`. A problem's split is decided by a hash of its question, as for every task. Where a
data set scores answers itself, since several may be right, so do we: `kimi_rl/rewards/reasoning_gym.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

from kimi_rl.dataset.tasks.base import HELD_OUT_SHARE, STALE_DRAWS, Problem, Split, stable_hash
from kimi_rl.errors import InputError, one_line
from kimi_rl.rewards.extract import final_answer
from kimi_rl.rewards.reasoning_gym import KIND, encode_gold, score

PREFIX = "reasoning_gym/"
CHUNK = 500  # problems to a seed of the data set; some make all of theirs at the start
_NO_ANSWER = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")
_UNSTEADY = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note")
REFUSED = {
    "composite": "mixes other data sets",
    **dict.fromkeys(_NO_ANSWER, "states no answer"),
    **dict.fromkeys(_UNSTEADY, "makes other problems in every process, whatever the seed"),
}
# Their own parameters of these names would break the seeded splits.
_NOT_PARAMETERS = ("seed", "size")


@dataclasses.dataclass(frozen=True)
class ReasoningGymTask:
    """A data set of reasoning-gym, used as the tasks of `base.py` are. `dataset`: its name there."""

    name: str
    dataset: str
    answer_kind: str
    # Some data sets take a second a problem.
    train_size: int = 1_000
    held_out_size: int = 100
    instruction: str = "Reason step by step and put the final answer within \\boxed{}."
    form: str = "boxed"

    def split_of(self, question: str) -> Split:
        """The one split that `question` belongs to."""
        return "held_out" if stable_hash(self.name, question) % HELD_OUT_SHARE == 0 else "train"

    def problems(self, size: int, split: Split, seed: int, params: str) -> list[Problem]:
        """The first `size` different problems of `split`; fewer where the data set has no more."""
        found: dict[str, Problem] = {}
        stale = 0
        stream = self._stream(seed, params)
        while len(found) < size and stale < STALE_DRAWS:
            problem = next(stream)
            if problem is None or problem.question in found or self.split_of(problem.question) != split:
                stale += 1
                continue
            stale = 0
            found[problem.question] = problem
        return list(found.values())

    def _stream(self, seed: int, params: str) -> Iterator[Problem | None]:
        index = 0
        while True:
            yield _problem(self.dataset, params, seed, index, self.answer_kind)
            index += 1

    def parse_params(self, values: dict[str, Any]) -> str:
        """The checked parameters as JSON. Raises InputError naming the key, or with the data set's own complaint."""
        config_class = _package().factory.DATASETS[self.dataset][1]
        known = [field.name for field in dataclasses.fields(config_class) if field.name not in _NOT_PARAMETERS]
        for key in values:
            if key in _NOT_PARAMETERS:
                raise InputError(
                    f"data.params.{key}: {self.name} takes it from data.seed and data.train_size; remove it here"
                )
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(
                    f"data.params.{key}: {self.name} has no such parameter{hint} (known: {', '.join(known)})"
                )
        try:
            params = json.dumps(values, sort_keys=True)
            _dataset(self.dataset, params, 0)
        except Exception as error:  # noqa: BLE001 - assertions and whatever a wrong type leads to
            reason = one_line(error) or type(error).__name__
            raise InputError(f"data.params: {self.name}: {reason}, found {values!r}") from None
        return params


def find_task(name: str) -> ReasoningGymTask:
    """The task `reasoning_gym/NAME`. Raises InputError without the package, and for unknown and refused names."""
    package = _package()
    from reasoning_gym.dataset import ProceduralDataset

    dataset = name.removeprefix(PREFIX)
    known = [other for other in sorted(package.factory.DATASETS) if other not in REFUSED]
    if dataset in REFUSED:
        raise InputError(f"data.task: {name} cannot be used, since it {REFUSED[dataset]}; choose another one")
    if dataset not in known:
        near = difflib.get_close_matches(dataset, known, n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else f"known: {', '.join(known)}"
        raise InputError(f"data.task: reasoning-gym has no data set {dataset!r}; {hint}")
    own_score = package.factory.DATASETS[dataset][0].score_answer is not ProceduralDataset.score_answer
    return ReasoningGymTask(name, dataset, KIND if own_score else "exact")


def _package() -> ModuleType:
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError(
            f"data.task: the {PREFIX}... tasks need reasoning-gym ({error}); run `pip install reasoning-gym`"
        ) from None
    return reasoning_gym


@lru_cache(maxsize=4)
def _dataset(name: str, params: str, seed: int) -> Any:
    return _package().create_dataset(name, seed=seed, size=CHUNK, **json.loads(params))


@lru_cache(maxsize=50_000)  # both splits are drawn from one stream, and a run loads its problems several times
def _problem(name: str, params: str, seed: int, index: int, kind: str) -> Problem | None:
    """Problem number `index` of the stream; None where its answer fits no box or does not get the full score."""
    chunk = stable_hash(name, seed, index // CHUNK) % 2**31
    entry = _dataset(name, params, chunk)[index % CHUNK]
    answer = str(entry["answer"]).strip()
    solution = f"\\boxed{{{answer}}}"
    if final_answer(solution) != answer:
        return None
    if kind != KIND:
        return Problem(entry["question"], solution, answer)
    gold = encode_gold(name, json.loads(params), entry)
    return Problem(entry["question"], solution, gold) if score(answer, gold).status == "correct" else None
