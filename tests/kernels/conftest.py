"""Kernel tests draw fresh inputs on every run. A failure shows the seed; KIMI_RL_TEST_SEED repeats it."""

import os
import random

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    value = int(os.environ.get("KIMI_RL_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"KIMI_RL_TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture(autouse=True)
def automatic_dispatch(monkeypatch):
    monkeypatch.delenv("KIMI_RL_KERNELS", raising=False)
