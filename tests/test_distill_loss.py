"""The distillation loss in tiles against its plain form, and the pieces it is used with."""

import pytest
import torch

from kimi_rl.kernels.distill_loss import distill_loss, distill_loss_reference, distill_loss_torch
from kimi_rl.kernels.relative_error import relative_error
from kimi_rl.learner import muon
from kimi_rl.learner.muon import Muon
from kimi_rl.learner.optimizers import MuonWithAdamW, muon_with_adamw


def inputs(tokens=11, vocabulary=17, width=6, teacher_width=5, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    teacher = torch.randn(tokens, teacher_width, dtype=dtype), torch.randn(vocabulary, teacher_width, dtype=dtype)
    return hidden, weight, *teacher, torch.randint(vocabulary, (tokens,))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
@pytest.mark.parametrize("tile", [1, 4, 100])
def test_tiles_equal_the_plain_form_with_their_gradients(temperature, weights, tile):
    settings = dict(temperature=temperature, kl_weight=weights[0], ce_weight=weights[1])
    found, wanted = inputs(), inputs()
    ours = distill_loss_torch(*found, **settings, tile=tile)
    theirs = distill_loss_reference(*wanted, **settings)
    torch.testing.assert_close([x.detach() for x in ours], [x.detach() for x in theirs], rtol=1e-12, atol=1e-12)
    (3 * ours[0]).backward()  # a gradient from above that is not 1
    (3 * theirs[0]).backward()
    torch.testing.assert_close(found[0].grad, wanted[0].grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1].grad, wanted[1].grad, rtol=1e-10, atol=1e-12)


def test_gradient_by_finite_differences():
    hidden, weight, *rest = inputs(tokens=4, vocabulary=7, width=3)
    settings = dict(temperature=1.7, kl_weight=0.6, ce_weight=0.4, tile=3)
    assert torch.autograd.gradcheck(lambda h, w: distill_loss_torch(h, w, *rest, **settings)[0], (hidden, weight))


def test_the_loss_is_zero_at_the_teacher_and_says_its_parts():
    hidden, weight, *_, labels = inputs()
    same = distill_loss(hidden, weight, hidden, weight, labels, temperature=3.0)
    assert same.loss.item() == pytest.approx(0, abs=1e-12)
    same.loss.backward()
    assert hidden.grad.abs().max() < 1e-12
    found = distill_loss(*inputs(), temperature=2.0, kl_weight=0.5, ce_weight=0.25)
    assert found.loss.item() == pytest.approx((0.5 * 4 * found.kl + 0.25 * found.ce).item())
    assert not found.kl.requires_grad and not found.ce.requires_grad


def test_products_in_bf16_are_summed_in_float32():
    data = inputs(tokens=64, vocabulary=300, width=32, teacher_width=32, dtype=torch.float32)
    exact = distill_loss(*data, ce_weight=1.0)
    rough = distill_loss(*data, ce_weight=1.0, matmul_dtype=torch.bfloat16)
    assert exact.loss.dtype == rough.loss.dtype == torch.float32
    assert rough.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
    (gradient,) = torch.autograd.grad(exact.loss, data[1])
    (close,) = torch.autograd.grad(rough.loss, data[1])
    assert (gradient - close).norm() < 0.02 * gradient.norm()


def test_wrong_shapes_and_temperatures_are_refused():
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    with pytest.raises(ValueError, match="shapes do not fit"):
        distill_loss(hidden, weight, teacher_hidden[1:], teacher_weight, labels)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        distill_loss(hidden, weight, teacher_hidden, teacher_weight, labels, temperature=0.0)


def test_relative_error():
    wanted = torch.tensor([3.0, 4.0])
    assert relative_error(torch.zeros(2), wanted).item() == 1
    assert relative_error(wanted, wanted).item() == 0
    assert relative_error(torch.tensor([3.0, 9.0]).bfloat16(), wanted).item() == 1
    with pytest.raises(ValueError, match="differ"):
        relative_error(torch.zeros(1, 2), wanted)


# --- the optimizer ----------------------------------------------------------------------------------------------


def small_model():
    torch.manual_seed(1)
    return torch.nn.ModuleDict(
        {
            "model": torch.nn.ModuleDict(
                {
                    "embed": torch.nn.Embedding(8, 6),
                    "layers": torch.nn.ModuleList([torch.nn.Linear(6, 6), torch.nn.LayerNorm(6)]),
                }
            )
        }
    )


def step(model, optimizer):
    x = model["model"]["embed"].weight
    for layer in model["model"]["layers"]:
        x = layer(x)
    optimizer.zero_grad()
    x.square().mean().backward()
    optimizer.step()


class Reachable(torch.nn.Module):
    """`model.model.layers`, as a causal language model has it."""

    def __init__(self, inner):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed, self.model.layers = inner["model"]["embed"], inner["model"]["layers"]


def test_muon_gets_hidden_matrices_and_both_parts_follow_one_schedule():
    model = Reachable(small_model())
    optimizer = muon_with_adamw(model, lr=0.1, weight_decay=0.01)
    matrices, adamw = optimizer.parts
    assert isinstance(matrices, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert [p.shape for g in matrices.param_groups for p in g["params"]] == [(6, 6)]
    decayed = {p.shape: g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert decayed == {(8, 6): 0.01, (6,): 0.0}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    optimizer.step()
    schedule.step()
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.05}


def test_frozen_parameters_are_left_out():
    model = Reachable(small_model()).requires_grad_(False)
    model.model.layers[0].weight.requires_grad_(True)
    (only,) = muon_with_adamw(model, lr=0.1, weight_decay=0.0).parts
    assert isinstance(only, torch.optim.Muon)


SHAPES = [(6, 6), (6, 10), (10, 6), (6, 10), (6, 6), (6, 10), (3, 1)]


def muon_steps(monkeypatch, kind, steps, *, batched, weights=None, state=None, first=0, decay=0.1):
    """Parameters and optimizer after some steps on gradients that are a function of the step."""
    monkeypatch.setenv("KIMI_RL_BATCHED_MUON", batched)
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(*shape, generator=generator) for shape in SHAPES]
    parameters = [torch.nn.Parameter(w.clone()) for w in weights or drawn]
    optimizer = kind(parameters, lr=0.05, weight_decay=decay)
    if state is not None:
        optimizer.load_state_dict(state)
    for n in range(first, first + steps):
        for number, p in enumerate(parameters):
            generator.manual_seed(100 * n + number)
            p.grad = None if number == 4 and n == 1 else torch.randn(p.shape, generator=generator)
        optimizer.param_groups[0]["lr"] = 0.05 / (n + 1)
        optimizer.step()
    return [p.detach() for p in parameters], optimizer


def torch_muon(parameters, *, lr, weight_decay):
    return torch.optim.Muon(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("elements", [1 << 27, 130, 1])
def test_muon_in_batches_is_torchs(monkeypatch, decay, elements):
    monkeypatch.setattr(muon, "ELEMENTS", elements)
    (start, _), (wanted, theirs) = (muon_steps(monkeypatch, torch_muon, n, batched="0", decay=decay) for n in (0, 5))
    found, ours = muon_steps(monkeypatch, Muon, 5, batched="1", decay=decay)
    for before, a, b in zip(start, found, wanted, strict=True):
        assert (a - b).norm() < 0.02 * (b - before).norm()  # in bf16 an order of sums tells
        assert (b - before).norm() > 0.01
    states = [optimizer.state_dict()["state"] for optimizer in (ours, theirs)]
    assert states[0].keys() == states[1].keys() == set(range(len(SHAPES)))
    for a, b in ((states[0][number], states[1][number]) for number in range(len(SHAPES))):
        assert a.keys() == b.keys() == {"momentum_buffer"}
        torch.testing.assert_close(a["momentum_buffer"], b["momentum_buffer"])
    same, _ = muon_steps(monkeypatch, Muon, 5, batched="0", decay=decay)  # the switch
    assert all(torch.equal(a, b) for a, b in zip(same, wanted, strict=True))


def test_muon_orthogonalises_in_batches():
    torch.manual_seed(0)
    for shape in ((4, 12, 30), (4, 30, 12), (2, 9, 9)):
        found = muon.orthogonalised(torch.randn(shape), (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert found.shape == shape and found.dtype == torch.bfloat16
        for matrix in found:
            values = torch.linalg.svdvals(matrix.float())
            assert values.min() > 0.4 or shape == (2, 9, 9)  # a square one may have a value near 0
            assert values.max() < 1.4


def test_muon_in_batches_goes_on_from_what_torch_saved(monkeypatch):
    whole, _ = muon_steps(monkeypatch, Muon, 5, batched="1")
    half, optimizer = muon_steps(monkeypatch, Muon, 2, batched="1")
    again, _ = muon_steps(monkeypatch, Muon, 3, batched="1", weights=half, state=optimizer.state_dict(), first=2)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    half, optimizer = muon_steps(monkeypatch, torch_muon, 2, batched="0")
    other, _ = muon_steps(monkeypatch, Muon, 3, batched="1", weights=half, state=optimizer.state_dict(), first=2)
    for a, b in zip(other, whole, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_reloaded_optimizer_goes_on_the_same(tmp_path):
    def make():
        inner = small_model()
        layers = inner["model"]["layers"]
        others = [inner["model"]["embed"].weight, layers[0].bias, *layers[1].parameters()]
        return inner, MuonWithAdamW([layers[0].weight], others, lr=0.1, weight_decay=0.1)

    one, ours = make()
    for _ in range(4):
        step(one, ours)
    two, theirs = make()
    for _ in range(2):
        step(two, theirs)
    torch.save(theirs.state_dict(), tmp_path / "optimizer.pt")
    three, again = make()
    three.load_state_dict(two.state_dict())
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for _ in range(2):
        step(three, again)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters(), strict=True))
