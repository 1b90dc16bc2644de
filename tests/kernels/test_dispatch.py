import logging

import pytest
import torch

from kimi_rl.errors import InputError
from kimi_rl.kernels import dispatch
from kimi_rl.kernels.kda_chunk import kda_chunk


class OnGPU:
    """Looks like a CUDA tensor to the dispatcher."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype=torch.bfloat16):
        self.dtype = dtype


@pytest.fixture
def with_fla(monkeypatch):
    monkeypatch.setattr(dispatch, "fla_installed", lambda: True)


def test_automatic_choice(with_fla, monkeypatch):
    cpu = torch.zeros(1)
    assert dispatch.choose("kda_chunk", cpu, has_fla=True) == "torch"
    assert dispatch.choose("kda_chunk", OnGPU(), has_fla=True) == "fla"
    assert dispatch.choose("kda_chunk", OnGPU(torch.float64), has_fla=True) == "torch"
    assert dispatch.choose("short_conv", OnGPU(), has_fla=False) == "torch"
    flex = {"has_fla": False, "has_flex": True}
    assert dispatch.choose("varlen_attention", OnGPU(), **flex) == "flex"
    assert dispatch.choose("varlen_attention", OnGPU(torch.float64), **flex) == "torch"
    assert dispatch.choose("varlen_attention", cpu, **flex) == "torch"
    monkeypatch.setattr(dispatch, "fla_installed", lambda: False)
    assert dispatch.choose("kda_chunk", OnGPU(), has_fla=True) == "torch"


@pytest.mark.parametrize("forced", ["reference", "torch"])
def test_forced_choice(with_fla, monkeypatch, forced):
    monkeypatch.setenv(dispatch.ENV, forced)
    assert dispatch.choose("kda_chunk", OnGPU(), has_fla=True) == forced
    assert dispatch.choose("kda_chunk", torch.zeros(1), has_fla=True) == forced
    assert dispatch.choose("varlen_attention", OnGPU(), has_fla=False, has_flex=True) == forced


def test_the_reference_can_be_forced_end_to_end(monkeypatch):
    q, k, v = torch.randn(3, 1, 6, 2, 4)
    g, beta = -torch.rand(1, 6, 2, 4), torch.rand(1, 6, 2)
    expected, _ = kda_chunk(q, k, v, g, beta)
    monkeypatch.setenv(dispatch.ENV, "reference")
    calls = []
    reference = kda_chunk.__globals__["kda_reference"]
    monkeypatch.setitem(
        kda_chunk.__globals__, "kda_reference", lambda *a, **kw: calls.append(1) or reference(*a, **kw)
    )
    torch.testing.assert_close(kda_chunk(q, k, v, g, beta)[0], expected)
    assert calls == [1]


def test_fla_on_a_cpu_is_refused(with_fla, monkeypatch):
    monkeypatch.setenv(dispatch.ENV, "fla")
    with pytest.raises(InputError, match="needs? an NVIDIA GPU"):
        dispatch.choose("kda_chunk", torch.zeros(1), has_fla=True)
    assert dispatch.choose("short_conv", torch.zeros(1), has_fla=False) == "torch"


def test_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv(dispatch.ENV, "cuda")
    with pytest.raises(InputError, match="KIMI_RL_KERNELS: found 'cuda'"):
        dispatch.choose("kda_chunk", torch.zeros(1), has_fla=True)


def test_each_choice_is_logged_once(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.logger.name):
        for _ in range(3):
            dispatch.choose("kda_chunk", torch.zeros(1), has_fla=True)
    assert [r.getMessage() for r in caplog.records] == ["kernel kda_chunk on cpu: torch"]
