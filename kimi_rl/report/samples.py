"""Which rollouts a report shows: early and late ones, right and wrong."""

from __future__ import annotations

from typing import Any

from kimi_rl.run_dir import RunDir

_PER_KIND = 3  # right ones, and as many wrong ones, of each step that is shown
_MAX_CHARS = 1500


def stage_samples(run: RunDir, stage: str, warnings: list[str]) -> list[dict[str, Any]]:
    """Samples of a stage's first and last training rollouts, or of its evaluations where it has none.

    A file that cannot be read adds a line to `warnings`.
    """
    samples = []
    for when, source, step in _sources(run, stage):
        try:
            rows = run.read_rollouts(source, step)
        except Exception as error:  # whatever pyarrow makes of a damaged file, the page must come out
            warnings.append(f"{run.rollouts_path(source, step)}: cannot be read ({type(error).__name__})")
            continue
        samples += [_sample(row, when) for row in choose(rows)]
    return samples


def _sources(run: RunDir, stage: str) -> list[tuple[str, str, int]]:
    """(what to call it, folder, step) of the rollouts to show."""
    steps = run.rollout_steps(stage)
    if steps:
        return [(f"step {step}", stage, step) for step in dict.fromkeys((steps[0], steps[-1]))]
    found = []
    for when in ("before", "after"):
        steps = run.rollout_steps(f"{stage}_eval_{when}")
        found += [(f"{when} the stage", f"{stage}_eval_{when}", steps[-1])] if steps else []
    return found


def choose(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Right ones first, then wrong ones: of these one of each verdict before a second of any."""
    right = [row for row in rows if is_right(row)]
    seen: dict[str, int] = {}
    ranked = []
    for row in rows:
        if not is_right(row):
            status = str(row.get("status"))
            ranked.append((seen.get(status, 0), row))
            seen[status] = seen.get(status, 0) + 1
    wrong = [row for _, row in sorted(ranked, key=lambda pair: pair[0])]
    return _different(right)[:_PER_KIND] + _different(wrong)[:_PER_KIND]


def _different(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of different problems first: a group holds many completions of one."""
    first: dict[str, dict[str, Any]] = {}
    rest = []
    for row in rows:
        problem = str(row.get("question") or row.get("prompt"))
        if problem in first:
            rest.append(row)
        else:
            first[problem] = row
    return [*first.values(), *rest]


def is_right(row: dict[str, Any]) -> bool:
    status = row.get("status")
    return status == "correct" if status is not None else (row.get("reward") or 0) > 0


def _sample(row: dict[str, Any], when: str) -> dict[str, Any]:
    reward = row.get("reward")
    return {
        "when": when,
        "right": is_right(row),
        "status": str(row.get("status") or "–").replace("_", " "),
        "reason": _cut(row.get("reason")),
        "prompt": _cut(_prompt_text(row)),
        "completion": _cut(row.get("completion")),
        "gold": _cut(row.get("gold")),
        "parsed": _cut(row.get("parsed"), missing="–"),
        "reward": f"{reward:g}" if isinstance(reward, (int, float)) else "–",
    }


def _prompt_text(row: dict[str, Any]) -> Any:
    prompt = row.get("question") or row.get("prompt")
    if isinstance(prompt, list):  # chat messages
        return "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt if isinstance(m, dict))
    return prompt


def _cut(value: Any, missing: str = "") -> str:
    if value is None:
        return missing
    text = str(value)
    more = len(text) - _MAX_CHARS
    return f"{text[:_MAX_CHARS]}… ({more:,} more characters)" if more > 0 else text
