"""The K1.5 objective against a gradient computed by hand, and against a bandit solved in closed form."""

import pytest
import torch

from kimi_rl.objective import drift_kl, group_advantages, k15_loss, ptx_loss


@pytest.mark.parametrize("weighting", ["none", "token", "sequence"])
def test_gradient_equals_a_hand_computation(weighting):
    seed = torch.seed() % 2**31
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    batch, length, vocab, tau = 6, 5, 7, 0.3
    logits = torch.randn(batch, length, vocab, generator=generator, dtype=torch.double, requires_grad=True)
    tokens = torch.randint(0, vocab, (batch, length), generator=generator)
    old = torch.randn(batch, length, generator=generator, dtype=torch.double) - 2
    mask = (torch.rand(batch, length, generator=generator) < 0.8).double()
    rewards = torch.rand(batch, generator=generator, dtype=torch.double)
    shape = {"none": None, "token": (batch, length), "sequence": (batch, 1)}[weighting]
    weights = None if shape is None else torch.rand(shape, generator=generator, dtype=torch.double) * 2

    logps = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    advantages = group_advantages(rewards, 3)
    k15_loss(logps, old, mask, advantages, tau=tau, weights=weights).backward()

    # By hand, without autograd: d log softmax(z)_y / dz = onehot(y) - softmax(z), and
    # dL/dlogp_jt = m_jt (tau * sum_s m_js (logp - old)_js - w_jt (r_j - mean r)) / B.
    with torch.no_grad():
        centred = rewards - rewards.view(-1, 3).mean(1).repeat_interleave(3)
        log_ratio = ((logps - old) * mask).sum(1, keepdim=True)
        w = torch.ones(1, dtype=torch.double) if weights is None else weights
        outer = mask * (tau * log_ratio - w * centred[:, None]) / batch
        onehot = torch.nn.functional.one_hot(tokens, vocab).double()
        expected = outer[..., None] * (onehot - logits.softmax(-1))
    assert torch.allclose(logits.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_a_bandit_converges_to_the_regularised_optimum(tau):
    """Three arms, the expectation over pi_old taken exactly: pi must become pi_old exp(r / tau) / Z."""
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
    rewards = torch.tensor([0.1, 0.9, 0.4], dtype=torch.double)
    optimum = old * (rewards / tau).exp()
    optimum = optimum / optimum.sum()
    copies = (old * 10).round().int().tolist()  # samples in exactly the proportions of pi_old
    arms = torch.tensor([arm for arm, count in enumerate(copies) for _ in range(count)])
    advantages = group_advantages(rewards[arms], len(arms), baseline="log_partition", tau=tau)
    logits = old.log().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logps = logits.log_softmax(0)[arms][:, None]
        loss = k15_loss(logps, old.log()[arms][:, None], torch.ones_like(logps), advantages, tau=tau)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (logits.softmax(0) - optimum).abs().max() < 1e-3
    assert (old - optimum).abs().max() > 0.05, "the optimum must be away from the start for this to mean anything"


def test_mean_baseline_tends_to_the_log_partition_for_large_tau():
    rewards = torch.rand(8, dtype=torch.double)
    mean = group_advantages(rewards, 8)
    found = [group_advantages(rewards, 8, baseline="log_partition", tau=tau) for tau in (1.0, 10.0, 100.0)]
    gaps = [(advantages - mean).abs().max() for advantages in found]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-2


def test_missing_rewards_leave_the_baseline_and_teach_nothing():
    rewards = torch.tensor([1.0, float("nan"), 0.0, 0.5, 0.5, 0.5])
    for baseline in ("mean", "log_partition"):
        advantages = group_advantages(rewards, 3, baseline=baseline, tau=0.5)
        assert advantages[1] == 0 and torch.isfinite(advantages).all()
        assert advantages[3:].abs().max() < 1e-6
    assert torch.allclose(group_advantages(rewards, 3)[:3], torch.tensor([0.5, 0.0, -0.5]))


def test_ptx_loss_by_hand():
    """Every labelled token counts once, whatever sample it stands in; the label of a position is the next token."""
    logits = torch.randn(2, 4, 5, dtype=torch.double, requires_grad=True)
    labels = torch.tensor([[3, -100, 1, 2], [0, 4, -100, -100]])
    logps = logits.detach().log_softmax(-1)
    expected = -(logps[0, 1, 1] + logps[0, 2, 2] + logps[1, 0, 4]) / 3
    loss = ptx_loss(logits, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert logits.grad[0, 0].abs().sum() == 0 and logits.grad[1, 1:].abs().sum() == 0


def test_drift_is_the_kl_of_the_sampled_tokens():
    """The k3 estimate, averaged over samples of the old policy, is KL(old || new)."""
    torch.manual_seed(0)
    old, new = torch.randn(2, 6, dtype=torch.double).log_softmax(-1)
    tokens = torch.multinomial(old.exp(), 200_000, replacement=True)
    exact = (old.exp() * (old - new)).sum().item()
    estimate = drift_kl(old[tokens][None], new[tokens][None], torch.ones(1, len(tokens)))
    assert estimate == pytest.approx(exact, rel=0.03)
    assert drift_kl(old[None, :2], new[None, :2], torch.zeros(1, 2)) == 0.0
