"""Rewards for the form of a completion: think and answer tags. Pure functions of the text."""

from __future__ import annotations

import re

_TAG = re.compile(r"</?(?:think|answer)>")


def think_format(completion: str) -> float:
    """1.0 if the completion is `<think>...</think>` and then a non-empty rest, each tag exactly once; else
    0.0.

    An opening tag that the chat template already put into the prompt may be missing.
    """
    tags = _TAG.findall(completion)
    thought, _, rest = completion.partition("</think>")
    starts_well = tags == ["</think>"] or (
        tags == ["<think>", "</think>"] and completion.lstrip().startswith("<think>")
    )
    return float(starts_well and bool(rest.strip()) and bool(thought.replace("<think>", "").strip()))


def think_answer_format(completion: str) -> float:
    """1.0 if the completion is `<think>...</think><answer>...</answer>`, both non-empty, nothing else; else
    0.0.
    """
    if _TAG.findall(completion) != ["<think>", "</think>", "<answer>", "</answer>"]:
        return 0.0
    before, thought, between, answer, after = _TAG.split(completion)
    return float(not (before + between + after).strip() and bool(thought.strip()) and bool(answer.strip()))
