"""Built-in procedural tasks. A new one is a file with a `TASK`, listed here."""

from __future__ import annotations

import difflib

from kimi_rl.dataset.tasks import arithmetic, mqar, palindrome, stack
from kimi_rl.dataset.tasks.base import Problem, Task, TaskParams
from kimi_rl.errors import InputError

TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (arithmetic, palindrome, mqar, stack)}

__all__ = ["TASKS", "Problem", "Task", "TaskParams", "get_task"]


def get_task(name: str) -> Task:
    """The task called `name`. Raises InputError listing the known ones."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"data.task: unknown task {name!r}{hint} (known: {', '.join(TASKS)})")
