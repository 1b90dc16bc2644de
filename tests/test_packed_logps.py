"""The learner's packed log-probs: each sample in a pack gets what it gets alone, values and gradients.

Weights are large, so that a token hears its whole context and a leak is loud. Each check is also given planted leaks,
and must see every one of them.
"""

import contextlib
import random
import types

import pytest
import torch

from kimi_rl.kernels.short_conv import rows_before, short_conv
from kimi_rl.learner.packed import PackedLogps, PackingSettings
from kimi_rl.model import modeling
from kimi_rl.model.modeling import KimiLinearForCausalLM, as_served
from kimi_rl.model.presets import build_config
from kimi_rl.recipe import ModelSection

VOCABULARY = 64
LOUD = {
    "initializer_range": 0.1,
    "hidden_size": 32,
    "linear_head_dim": 8,
    "intermediate_size": 48,
    "kv_lora_rank": 16,
}
VARIANTS = [(arch, mlp) for arch in ("hybrid", "mla") for mlp in ("dense", "moe")]
MODES = ("packed", "shared_prompt")


def make_model(arch="hybrid", mlp="dense", **overrides):
    section = ModelSection(arch=arch, mlp=mlp, size="tiny", overrides=LOUD | overrides)
    torch.manual_seed(0)
    config = build_config(section, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return KimiLinearForCausalLM(config).eval()


def in_float64(model):
    """The model in float64 throughout: transformers' norms go through float32 whatever they are given."""

    def norm(self, x, gate=None):
        x = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))
        return x if gate is None else x * gate.sigmoid()

    for module in model.modules():
        if isinstance(module, modeling.hf.KimiLinearRMSNorm | modeling.hf.KimiLinearRMSNormGated):
            module.forward = types.MethodType(norm, module)
    return model.double()


class StandIn(PackedLogps):
    """As much of the trainer as the mixin reads."""

    temperature = 0.8
    accelerator = types.SimpleNamespace(autocast=contextlib.nullcontext, unwrap_model=lambda model: model)

    def __init__(self, model, mode, tokens=10_000):
        self.model, self.packing = model, PackingSettings(mode, tokens)


def batch():
    """Two groups and a loner, shuffled: (prompts, completions), lengths from 1 up."""
    prompts, completions = [], []
    for size in (4, 3, 1):
        prompt = torch.randint(3, VOCABULARY, (random.choice([1, 2, 20, 37]),)).tolist()
        for _ in range(size):
            prompts.append(prompt)
            completions.append(torch.randint(3, VOCABULARY, (random.choice([1, 2, 3, 19, 40, 70]),)).tolist())
    order = random.sample(range(8), 8)
    return [prompts[i] for i in order], [completions[i] for i in order]


def padded(prompts, completions):
    left, right = max(map(len, prompts)), max(map(len, completions))
    ids = torch.zeros(len(prompts), left + right, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        where = slice(left - len(prompt), left + len(completion))
        ids[i, where], mask[i, where] = torch.tensor([*prompt, *completion]), 1
    return ids, mask, right


def packed_scores(model, prompts, completions, mode, **options):
    """Log-probs and entropies, one tensor a sample."""
    ids, mask, width = padded(prompts, completions)
    ids, mask = ids.to(model.device), mask.to(model.device)
    logps, entropies, aux = StandIn(model, mode, **options)._get_per_token_logps_and_entropies(
        model, ids, mask, width, compute_entropy=True
    )
    assert aux is None and logps.shape == entropies.shape == (len(prompts), width)
    assert not bool(logps[mask[:, -width:] == 0].any()), "padding scores 0"
    return [(logps[i, : len(c)], entropies[i, : len(c)]) for i, c in enumerate(completions)]


def alone_scores(model, prompt, completion):
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    hidden = model.model(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    # The head multiplies what the engine holds, in float32 throughout the learner.
    hidden, weight = (as_served(x).to(model.lm_head.weight.dtype) for x in (hidden, model.lm_head.weight))
    with torch.autocast(ids.device.type, enabled=False):
        logits = hidden @ weight.T
    logps = (logits / StandIn.temperature).log_softmax(-1)
    return logps.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def error(got, expected) -> float:
    """Root of the mean squared difference over that of the expected values."""
    return float((got - expected).norm() / expected.norm().clamp(min=1e-12))


def gradient(scores, model, keep=False) -> torch.Tensor:
    """Of a loss that weighs each token's log-prob and entropy differently, with respect to all parameters."""
    logps, entropies = scores
    weights = torch.linspace(0.5, 1.5, len(logps), dtype=logps.dtype, device=logps.device)
    loss = (logps * weights).sum() + 0.3 * (entropies * weights.flip(0)).sum()
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, parameters, strict=True)]
    )


def differences(model, mode, seed=0) -> tuple[float, float]:
    """Largest error over the samples of a random pack against the sample alone: (values, gradients)."""
    random.seed(seed)
    torch.manual_seed(seed)
    prompts, completions = batch()
    packed = packed_scores(model, prompts, completions, mode)
    values, gradients = [], []
    for got, prompt, completion in zip(packed, prompts, completions, strict=True):
        expected = alone_scores(model, prompt, completion)
        values += [error(a.detach(), b.detach()) for a, b in zip(got, expected, strict=True)]
        gradients.append(error(gradient(got, model, keep=True), gradient(expected, model)))
    return max(values), max(gradients)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch, mlp", VARIANTS)
def test_a_sample_in_a_pack_is_the_sample_alone(arch, mlp, mode):
    model = make_model(arch, mlp)
    values, gradients = differences(model, mode, seed=1)
    assert values < 1e-4 and gradients < 1e-4
    # In float64 what is left is rounding. (A router always works in float32.)
    values, gradients = differences(in_float64(model), mode, seed=2)
    assert max(values, gradients) < (1e-11 if mlp == "dense" else 1e-6)


def without(function, *names):
    """`function`, never told `names`."""
    return lambda *args, **kwargs: function(*args, **{k: v for k, v in kwargs.items() if k not in names})


def forgetful_attention(q, k, v, segments, **options):
    return kept_attention(q, k, v, modeling.Segments([0, segments.length]), **options)


def orphaned_attention(q, k, v, segments, **options):
    return kept_attention(q, k, v, modeling.Segments(segments.bounds), **options)


def constant_state(function):
    """Starts from the right state, and lets no gradient through it."""

    def run(*args, initial_state=None, **kwargs):
        return function(*args, initial_state=None if initial_state is None else initial_state.detach(), **kwargs)

    return run


def constant_history(x, weight, *, parents=None, **kwargs):
    """The same for the convolution, which finds the rows of the parent itself."""
    if parents is not None:
        kwargs["initial_state"] = rows_before(x, weight.shape[-1] - 1, parents).detach()
    return short_conv(x, weight, **kwargs)


kept_attention = modeling.varlen_attention
LEAKS = {
    ("packed", "KDA runs on"): ("kda_chunk", without(modeling.kda_chunk, "cu_seqlens")),
    ("packed", "the convolution runs on"): ("short_conv", without(modeling.short_conv, "cu_seqlens")),
    ("packed", "MLA sees all before it"): ("varlen_attention", forgetful_attention),
    ("shared_prompt", "MLA sees all before it"): ("varlen_attention", forgetful_attention),
    ("shared_prompt", "MLA does not see the prompt"): ("varlen_attention", orphaned_attention),
    ("shared_prompt", "KDA starts empty"): ("kda_chunk", without(modeling.kda_chunk, "initial_state")),
    ("shared_prompt", "the convolution starts empty"): ("short_conv", without(modeling.short_conv, "parents")),
}


@pytest.mark.parametrize("mode, leak", LEAKS, ids=": ".join)
def test_a_leak_is_seen(monkeypatch, mode, leak):
    monkeypatch.setattr(modeling, *LEAKS[mode, leak])
    values, gradients = differences(make_model(), mode, seed=1)
    assert values > 1e-3 and gradients > 1e-3


@pytest.mark.parametrize(
    "part, cut", [("kda_chunk", constant_state(modeling.kda_chunk)), ("short_conv", constant_history)]
)
def test_a_lost_gradient_is_seen(monkeypatch, part, cut):
    """Values are right, only the way back into the prompt is cut: the check of gradients must see it."""
    monkeypatch.setattr(modeling, part, cut)
    values, gradients = differences(make_model(), "shared_prompt", seed=1)
    assert values < 1e-4 and gradients > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_several_packs_give_the_same_and_hold_one_at_a_time(mode):
    """Above the token budget the batch is cut; gradients then come from packs that are run again."""
    random.seed(3)
    torch.manual_seed(3)
    model = make_model()
    prompts, completions = batch()

    def run(**options):
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            scores = packed_scores(model, prompts, completions, mode, **options)
        whole = tuple(torch.cat(parts) for parts in zip(*scores, strict=True))
        return saved, whole[0].detach(), gradient(whole, model)

    saved, logps, grad = run()
    few, cut_logps, cut_grad = run(tokens=150)
    assert error(cut_logps, logps) < 1e-5 and error(cut_grad, grad) < 1e-4
    assert few < 0.1 * saved


def test_a_batch_without_any_token_has_a_gradient_of_zero():
    model = make_model()
    ids, mask, width = padded([[5, 6], [7]], [[8, 9], [10]])
    mask[:, -width:] = 0
    logps, entropies, _ = StandIn(model, "packed")._get_per_token_logps_and_entropies(
        model, ids, mask, width, compute_entropy=True
    )
    assert not bool(logps.any()) and not bool(entropies.any())
    (logps.sum() + entropies.sum()).backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())


def test_what_packs_cannot_do_takes_the_padded_path():
    class Padded:
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return "padded"

    class Trainer(StandIn, Padded):
        pass

    ids, mask, width = padded([[5, 6]], [[8, 9]])
    args = (None, ids, mask, width)
    assert Trainer(None, "off")._get_per_token_logps_and_entropies(*args) == "padded"
    packed = Trainer(make_model(), "packed")
    assert packed._get_per_token_logps_and_entropies(*args, compute_aux_loss=True) == "padded"
    assert packed._get_per_token_logps_and_entropies(*args, pixel_values=torch.zeros(1)) == "padded"
    with torch.no_grad():
        logps, entropies, _ = packed._get_per_token_logps_and_entropies(packed.model, *args[1:], pixel_values=None)
    assert logps.shape == (1, 2) and entropies is None


class Loss:
    """Stands for TRL's trainer: the loss asks for the policy's log-probs, and then for those of some other rows."""

    def compute_loss(self, model, inputs):
        whole = [torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")]
        width = inputs["completion_ids"].shape[1]
        logps = [
            self._get_per_token_logps_and_entropies(model, ids, mask, width)[0]
            for ids, mask in (whole, [x.flip(0) for x in whole])
        ]
        return torch.stack(logps)


class LossStandIn(StandIn, Loss):
    pass


@pytest.mark.parametrize("mode", MODES)
def test_a_micro_batch_read_before_is_not_read_again(monkeypatch, mode):
    """On a card a read waits until the micro-batch before is through."""
    model, reads = make_model(), []
    parts = []
    for _ in range(2):
        ids, mask, width = padded(*batch())
        parts.append({"prompt_ids": ids[:, :-width], "completion_ids": ids[:, -width:]})
        parts[-1] |= {"prompt_mask": mask[:, :-width], "completion_mask": mask[:, -width:]}
    trainer = LossStandIn(model, mode)
    with torch.no_grad():
        expected = [trainer.compute_loss(model, part) for part in parts]
        trainer.copy_to_host(parts)
        monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append(self) or self)
        for part, logps in zip(parts, expected, strict=True):
            assert torch.equal(trainer.compute_loss(model, {**part, "advantages": None}), logps)
            assert len(reads) == 2, "of the second rows alone"
            reads.clear()
        other = {**parts[0], "completion_mask": parts[0]["completion_mask"].clone()}
        other["completion_mask"][0, 1:] = 0
        assert not torch.equal(trainer.compute_loss(model, other), expected[0])
        assert len(reads) == 4
