import math

import pytest
import torch

from kimi_rl.errors import RunError
from kimi_rl.mismatch import MismatchBar, measure_mismatch


def test_against_closed_forms():
    torch.manual_seed(0)
    engine = torch.randn(5, 9)
    mask = torch.ones(5, 9)
    shifted = measure_mismatch(engine + 0.1, engine, mask, cap=1.05)
    assert shifted.mean_abs == pytest.approx(0.1, abs=1e-6)
    assert shifted.max_abs == pytest.approx(0.1, abs=1e-6)
    assert shifted.kl == pytest.approx(math.exp(0.1) - 1.1, rel=1e-4)
    assert shifted.ratio_p01 == pytest.approx(math.exp(0.1), rel=1e-5)
    assert shifted.truncated_share == 1.0
    assert measure_mismatch(engine + 0.1, engine, mask, cap=1.2).truncated_share == 0.0


def test_only_masked_tokens_count():
    trainer, engine, mask = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)
    mask[0, 0] = 1
    trainer[0, 0], trainer[1, 1] = 0.5, 99.0
    assert measure_mismatch(trainer, engine, mask, 2.0).max_abs == pytest.approx(0.5)


def test_bar_stops_only_after_patience_bad_steps():
    good, bad = (measure_mismatch(torch.full((1, 4), d), torch.zeros(1, 4), torch.ones(1, 4), 2.0) for d in (0.0, 1.0))
    bar = MismatchBar(max_kl=0.01, patience=2)
    bar.check(bad, 1)
    bar.check(good, 2)
    bar.check(bad, 3)
    with pytest.raises(RunError, match=r"step 4.*max_kl.*Look first at"):
        bar.check(bad, 4)
    unlimited = MismatchBar(max_kl=None, patience=1)
    unlimited.check(bad, 1)


def test_a_mismatch_that_is_not_a_number_is_bad():
    nan = measure_mismatch(torch.full((1, 2), float("inf")), torch.zeros(1, 2), torch.ones(1, 2), 2.0)
    with pytest.raises(RunError):
        MismatchBar(max_kl=0.01, patience=1).check(nan, 1)
