"""Switches between an optimisation and the plain way: environment variables, named by what they switch."""

from __future__ import annotations

import os


def is_on(switch: str) -> bool:
    """Whether an optimisation that is on by default is to be used: unless the environment has `SWITCH=0`."""
    return os.environ.get(switch, "1") != "0"
