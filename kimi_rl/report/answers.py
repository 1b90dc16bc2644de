"""The answers that an evaluation of a run left on disk, problem by problem."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

from kimi_rl.run_dir import RunDir


@dataclass(frozen=True)
class Answers:
    """`questions`: of all problems. `measured`: whether each one's gold answer could be read; the others have an entry
    for each that could. `right`: whether the greedy answer is; None where that does not give the held-out accuracy
    (rewards other than 0 and 1). `shares`: of the samples that are right; None where there are none.
    """

    questions: list[str]
    measured: list[bool]
    right: list[bool] | None
    shares: list[float] | None


def read_answers(run: RunDir, stage: str, when: str | None, step: int, accuracy: float | None) -> Answers | None:
    """Of the evaluation of `stage` that gave `accuracy`; None where they are not on disk. A damaged file raises."""
    import pyarrow.parquet as pq  # not with the module: the terminal's commands start without it

    path = run.rollouts_path(f"{stage}_eval_{when}", step)
    if not path.is_file():
        return None
    with pq.ParquetFile(path) as file:  # the columns that are there; it has long texts as well
        table = file.read(columns=["question", "status", "solved_share"]).to_pydict()
    measured = [status != "unparseable_gold" for status in table["status"]]
    right = [status == "correct" for status in compress(table["status"], measured)]
    shares = list(compress(table.get("solved_share", []), measured))
    as_reported = accuracy is not None and right and abs(sum(right) / len(right) - accuracy) <= 1e-9
    return Answers(
        table["question"],
        measured,
        right if as_reported else None,
        shares if shares and None not in shares else None,
    )
