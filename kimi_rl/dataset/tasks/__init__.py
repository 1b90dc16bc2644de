"""Procedural tasks: the built-in ones (a new one is a file with a `TASK`, listed here) and reasoning-gym's."""

from __future__ import annotations

import difflib

from kimi_rl.dataset.tasks import arithmetic, mqar, palindrome, reasoning_gym, stack
from kimi_rl.dataset.tasks.base import Problem, Task, TaskParams
from kimi_rl.errors import InputError

TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (arithmetic, palindrome, mqar, stack)}

__all__ = ["TASKS", "Problem", "Task", "TaskParams", "get_task", "is_task"]


def is_task(name: str) -> bool:
    """Whether `name` is meant as a task, not as a data set or a path."""
    return name in TASKS or name.startswith(reasoning_gym.PREFIX)


def get_task(name: str) -> Task | reasoning_gym.ReasoningGymTask:
    """The task called `name`. Raises InputError listing the known ones."""
    if name in TASKS:
        return TASKS[name]
    if name.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.find_task(name)
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"data.task: unknown task {name!r}{hint} (known: {', '.join(TASKS)}, {reasoning_gym.PREFIX}NAME)")
