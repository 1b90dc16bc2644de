import random
import types

import pytest
import torch
import torch.nn.functional as F

from kimi_rl.kernels.kda_chunk import kda_chunk, kda_chunk_torch, kda_reference, torch_chunk

H, K, V = 2, 8, 6
NAMES = ("o", "final state", "dq", "dk", "dv", "dg", "dbeta", "dstate")


def make_inputs(batch, tokens, sequences=None, dtype=torch.float64, gate_scale=1.0):
    """q, k, v, g, beta, initial state: leaves that require grad."""
    tensors = {
        "q": torch.randn(batch, tokens, H, K, dtype=dtype),
        "k": torch.randn(batch, tokens, H, K, dtype=dtype),
        "v": torch.randn(batch, tokens, H, V, dtype=dtype),
        "g": -gate_scale * F.softplus(torch.randn(batch, tokens, H, K, dtype=dtype)),
        "beta": torch.rand(batch, tokens, H, dtype=dtype),
        "initial_state": torch.randn(sequences or batch, H, K, V, dtype=dtype),
    }
    return {name: x.requires_grad_() for name, x in tensors.items()}


def results(form, inputs, cu_seqlens=None, **kwargs):
    """Outputs and gradients of every input, for a loss that weighs each output element differently."""
    o, state = form(**inputs, output_final_state=True, cu_seqlens=cu_seqlens, **kwargs)
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).reshape(o.shape)
    loss = (o * weights).sum() + (state * torch.linspace(1, 2, state.numel()).reshape(state.shape)).sum()
    return [o, state, *torch.autograd.grad(loss, list(inputs.values()))]


def assert_equal(got, expected, tolerance):
    for name, a, b in zip(NAMES, got, expected, strict=True):
        difference = float((a - b).detach().abs().max())
        assert difference <= tolerance * max(1.0, float(b.detach().abs().max())), (
            f"{name} differs by {difference}"
        )


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_matches_reference_on_ragged_lengths(batch, chunk_size):
    for tokens in [1, 2, 17, random.randint(3, 60), random.randint(130, 300)]:
        inputs = make_inputs(batch, tokens)
        got = results(kda_chunk, inputs, chunk_size=chunk_size)
        assert_equal(got, results(kda_reference, inputs), 1e-10)


@pytest.mark.parametrize("normalise", [True, False])
def test_packed_matches_reference(normalise):
    lengths = [1, 65, random.randint(1, 40), 0, 1, random.randint(130, 200)]
    random.shuffle(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make_inputs(1, int(cu_seqlens[-1]), len(lengths))
    # Without normalisation the delta rule is only stable for short keys.
    inputs = (
        inputs if normalise else inputs | {"k": F.normalize(inputs["k"].detach(), dim=-1).requires_grad_()}
    )
    kwargs = {"use_qk_l2norm": normalise, "scale": 0.7}
    expected = results(kda_reference, inputs, cu_seqlens, **kwargs)
    assert_equal(results(kda_chunk, inputs, cu_seqlens, **kwargs), expected, 1e-10)


def test_packed_equals_one_sequence_at_a_time():
    lengths = [5, 40, 1, 33]
    bounds = [0, 5, 45, 46, 79]
    inputs = {name: x.detach() for name, x in make_inputs(1, sum(lengths), len(lengths)).items()}
    o, state = kda_chunk(**inputs, output_final_state=True, cu_seqlens=torch.tensor(bounds))
    for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        one = {name: x[:, a:b] for name, x in inputs.items() if name != "initial_state"}
        o_one, state_one = kda_chunk(
            **one, initial_state=inputs["initial_state"][n : n + 1], output_final_state=True
        )
        torch.testing.assert_close(o[:, a:b], o_one, rtol=0, atol=1e-12)
        torch.testing.assert_close(state[n : n + 1], state_one, rtol=0, atol=1e-12)


def leak(form) -> float:
    """How much the second of two packed sequences changes when the first one is replaced."""
    first, second = random.randint(3, 50), random.randint(3, 50)
    inputs = {name: x.detach() for name, x in make_inputs(1, first + second, 2, gate_scale=0.05).items()}
    other = make_inputs(1, first, 2, gate_scale=0.05)
    changed = {
        name: x if name == "initial_state" else torch.cat([other[name].detach(), x[:, first:]], dim=1)
        for name, x in inputs.items()
    }
    cu_seqlens = torch.tensor([0, first, first + second])
    (o_a, state_a), (o_b, state_b) = (
        form(**x, output_final_state=True, cu_seqlens=cu_seqlens) for x in (inputs, changed)
    )
    return max(float((o_a - o_b)[:, first:].abs().max()), float((state_a[1] - state_b[1]).abs().max()))


@pytest.mark.parametrize("form", [kda_chunk, kda_reference])
def test_nothing_leaks_between_packed_sequences(form):
    assert leak(form) == 0.0


def test_leak_is_detected(monkeypatch):
    """A layout that ignores the borders must fail the test above."""
    whole = torch_chunk._layout

    def without_borders(batch, length, cu_seqlens, *rest):
        return whole(batch, length, torch.tensor([0, length, length]), *rest)

    monkeypatch.setattr(torch_chunk, "_layout", without_borders)
    assert leak(kda_chunk) > 1e-3


@pytest.mark.parametrize("gate", [-50.0, -1e4, -1e30])
def test_extreme_gates_in_float32(gate):
    """Single tokens, whole stretches and single channels of very strong decay, among ordinary ones."""
    tokens = 150
    inputs = make_inputs(2, tokens, gate_scale=0.1)
    g = inputs["g"].detach()
    g[0, 5] = gate
    g[0, 40:90] = gate
    g[1, :, :, 0] = gate
    g[1, torch.rand(tokens) < 0.2] = gate
    inputs["g"] = g.requires_grad_()
    single = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    # The reference sees exactly the rounded inputs.
    double = {name: x.detach().double().requires_grad_() for name, x in single.items()}
    got, expected = results(kda_chunk, single), results(kda_reference, double)
    assert all(bool(torch.isfinite(x).all()) for x in got)
    assert_equal(got, expected, 2e-5)


def test_float32_is_as_accurate_as_the_recurrence():
    inputs = {name: x.detach() for name, x in make_inputs(2, 200).items()}
    exact, _ = kda_reference(**inputs)
    single = {name: x.float() for name, x in inputs.items()}
    error = float((kda_chunk(**single)[0] - exact).abs().max())
    assert error < 4 * float((kda_reference(**single)[0] - exact).abs().max()) + 1e-7


def test_dtypes():
    inputs = {name: x.detach().bfloat16() for name, x in make_inputs(1, 20).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = kda_chunk(**inputs, output_final_state=True)
        expected, _ = kda_chunk(**{name: x.float() for name, x in inputs.items()})
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    # Computed in float32, also under autocast: only the output is rounded.
    torch.testing.assert_close(o, expected.bfloat16(), rtol=0, atol=0)


def test_bad_shapes_are_refused():
    inputs = {name: x.detach() for name, x in make_inputs(2, 10).items()}
    with pytest.raises(ValueError, match="initial_state"):
        kda_chunk(**inputs | {"initial_state": inputs["initial_state"][:1]})
    with pytest.raises(ValueError, match="batch size 1"):
        kda_chunk(**inputs, cu_seqlens=torch.tensor([0, 4, 10]))
    one = {name: x[:1] for name, x in inputs.items()}
    for bad in ([0, 9], [1, 10], [0]):
        one["initial_state"] = None
        with pytest.raises(ValueError, match="cu_seqlens"):
            kda_chunk(**one, cu_seqlens=torch.tensor(bad))
    with pytest.raises(ValueError, match="cu_seqlens"):
        kda_chunk(**one, cu_seqlens=torch.tensor([0, 7, 5, 10]))
    with pytest.raises(ValueError, match="power of two"):
        kda_chunk(**one, chunk_size=48)


def test_reference_matches_fla_naive():
    naive = pytest.importorskip("fla.ops.kda.naive")
    inputs = {name: x.detach().float() for name, x in make_inputs(2, 70).items()}
    normed = inputs | {name: F.normalize(inputs[name], dim=-1) for name in "qk"}
    expected, expected_state = naive.naive_recurrent_kda(**normed, output_final_state=True)
    o, state = kda_reference(**normed, output_final_state=True, use_qk_l2norm=False)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-5)


def test_fla_form_calls_fla_as_fla_documents(monkeypatch):
    """The GPU form, with fla's kernel replaced by its own naive form behind the real signature."""
    kda = pytest.importorskip("fla.ops.kda")
    import inspect

    from fla.ops.kda.naive import naive_recurrent_kda

    from kimi_rl.kernels.kda_chunk.fla import kda_chunk_fla

    signature = inspect.signature(inspect.unwrap(kda.chunk_kda))
    seen = types.SimpleNamespace()

    def stand_in(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        seen.arguments = a = bound.arguments
        assert a["use_qk_l2norm_in_kernel"] and not a["use_gate_in_kernel"] and not a["safe_gate"]
        assert a["initial_state"].dtype == torch.float32 and a["kwargs"] == {"chunk_size": 64}
        q, k = (F.normalize(a[n].float(), dim=-1) for n in "qk")
        return naive_recurrent_kda(
            q, k, a["v"], a["g"], a["beta"], a["scale"], a["initial_state"], a["output_final_state"]
        )

    monkeypatch.setattr(kda, "chunk_kda", stand_in)
    inputs = {name: x.detach().float() for name, x in make_inputs(1, 40).items()}
    o, state = kda_chunk_fla(**inputs, output_final_state=True)
    expected, expected_state = kda_reference(**inputs, output_final_state=True)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-4)
    kda_chunk_fla(**inputs, cu_seqlens=torch.tensor([0, 40], dtype=torch.int32))
    assert seen.arguments["cu_seqlens"].dtype == torch.long


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
def test_fla_matches_reference_on_gpu(dtype, tolerance):
    pytest.importorskip("fla.ops.kda")
    lengths = [1, 65, 130]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    dim = 64
    shape = (1, int(cu_seqlens[-1]), H, dim)
    inputs = {name: torch.randn(shape, device="cuda").to(dtype) for name in "qkv"}
    inputs |= {
        "g": -F.softplus(torch.randn(shape, device="cuda")),
        "beta": torch.rand(shape[:3], device="cuda"),
    }
    inputs["initial_state"] = torch.randn(len(lengths), H, dim, dim, device="cuda")
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    outputs = []
    for form in (kda_chunk, kda_reference):
        o, state = form(**inputs, cu_seqlens=cu_seqlens.cuda(), output_final_state=True)
        loss = o.float().square().sum() + state.square().sum()
        outputs.append([o, state, *torch.autograd.grad(loss, list(inputs.values()))])
    for name, a, b in zip(NAMES, *outputs, strict=True):
        error = (a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt()
        assert float(error) < tolerance, f"{name}: relative error {float(error)}"


def test_torch_form_is_what_runs_on_a_cpu(monkeypatch):
    """fla is importable in the test environment; a CPU tensor must not reach it."""
    monkeypatch.setattr("kimi_rl.kernels.dispatch.fla_installed", lambda: True)
    inputs = {name: x.detach() for name, x in make_inputs(1, 5).items()}
    torch.testing.assert_close(kda_chunk(**inputs)[0], kda_chunk_torch(**inputs)[0], rtol=0, atol=0)
