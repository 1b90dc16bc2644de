"""A loss over several packs takes its backward pack by pack: TRL's own trainer, one pack against many."""

import tempfile

import pytest
import torch

from kimi_rl.bench.learner import BenchTrainer, make_batch, make_trainer, memory_of
from kimi_rl.learner.packed import PackingSettings
from kimi_rl.learner.packing import whole_rows
from kimi_rl.learner.silent import rows_to_run
from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.model.presets import bare_config
from kimi_rl.recipe import ModelSection

LOSSES = [(name, "token") for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo")]
LOSSES += [("grpo", "sequence"), ("luspo", "sequence")]
WHOLE, FEW = 10_000, 60  # tokens of a pack: all rows in one, or some


@pytest.fixture(scope="module")
def trainer_of():
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(bare_config(ModelSection(size="tiny", arch="hybrid", mlp="dense"), 512))

    def make(**options):
        with tempfile.TemporaryDirectory() as folder:
            return make_trainer(BenchTrainer, model, folder, 1, 12, 4, "cpu", max_completion_length=40, **options)

    return make


def inputs():
    """A micro-batch whose old and reference policies differ from the policy; the fourth row is masked out."""
    batch = make_batch(groups=3, group_size=4, prompt_tokens=9, mean=14, longest=40, vocabulary=512, seed=3)
    batch["completion_mask"][3] = 0
    shape = batch["completion_ids"].shape
    noise = torch.Generator().manual_seed(4)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        batch[name] = -6.2 + 0.3 * torch.randn(shape, generator=noise)
    batch["num_items_in_batch"] = batch["completion_mask"].sum().float()
    return batch


def outcome(trainer, mode, tokens):
    """Loss, gradient, metrics, and how often the model ran."""
    trainer.packing = PackingSettings(mode, tokens)
    model, runs = trainer.model.train(), []
    hook = model.model.register_forward_hook(lambda *_: runs.append(1))
    model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(model, inputs())
    trainer.accelerator.backward(loss)
    hook.remove()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.item(), gradient, dict(trainer._metrics["train"]), len(runs)


@pytest.mark.parametrize("mode", ["packed", "shared_prompt"])
@pytest.mark.parametrize("loss_type, level", LOSSES)
def test_many_packs_give_what_one_gives(trainer_of, loss_type, level, mode):
    trainer = trainer_of(loss_type=loss_type, importance_sampling_level=level)
    trainer.beta = 0.1
    loss, gradient, metrics, runs = outcome(trainer, mode, WHOLE)
    again = outcome(trainer, mode, FEW)
    packs = trainer._planned(*whole_rows(inputs()))
    assert runs == 1 and again[3] == len(packs) > 2, "each pack runs once, none a second time for its backward"
    assert again[0] == pytest.approx(loss, rel=1e-4)
    assert float((again[1] - gradient).norm() / gradient.norm()) < 1e-4
    assert metrics.keys() == again[2].keys() and "entropy" in metrics and "kl" in metrics
    for name, values in metrics.items():
        assert again[2][name] == pytest.approx(values, rel=1e-3, abs=1e-6, nan_ok=True), name


def test_a_loss_that_is_no_sum_over_samples_keeps_its_packs_together(trainer_of, monkeypatch):
    """The tokens of the highest entropy are those of all samples: a pack alone would choose others."""
    trainer = trainer_of(loss_type="dapo", top_entropy_quantile=0.4)
    whole = outcome(trainer, "packed", WHOLE)
    many = outcome(trainer, "packed", FEW)
    assert many[3] > whole[3] == 1
    assert float((many[1] - whole[1]).norm() / whole[1].norm()) < 1e-4
    # Pack by pack it is another gradient, which this check must see.
    monkeypatch.setattr(BenchTrainer, "_separable", True)
    wrong = outcome(trainer, "packed", FEW)
    assert float((wrong[1] - whole[1]).norm() / whole[1].norm()) > 1e-2


def test_activations_of_one_pack_at_a_time(trainer_of):
    trainer = trainer_of(loss_type="dapo")

    def most_kept(tokens):
        trainer.packing = PackingSettings("packed", tokens)
        step = lambda: trainer.accelerator.backward(trainer.compute_loss(trainer.model, inputs()))  # noqa: E731
        return memory_of(step, trainer.model, "cpu")[0]

    assert most_kept(FEW) < 0.4 * most_kept(WHOLE)


@pytest.mark.parametrize("tokens", [WHOLE, FEW])
@pytest.mark.parametrize("loss_type, level", LOSSES)
def test_rows_without_an_advantage_need_no_forward(trainer_of, monkeypatch, loss_type, level, tokens):
    trainer = trainer_of(loss_type=loss_type, importance_sampling_level=level)
    trainer.beta = 0.0
    silent = inputs() | {"advantages": inputs()["advantages"].clone()}
    silent["advantages"][[0, 2, 4, 5, 6, 7, 9, 10]] = 0.0
    monkeypatch.setitem(globals(), "inputs", lambda: silent)
    forwarded = []
    hook = trainer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: forwarded.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    loss, gradient, metrics, _ = outcome(trainer, "packed", tokens)
    plain = sum(forwarded)
    forwarded.clear()
    monkeypatch.setattr(BenchTrainer, "rows_that_count", lambda self, batch: rows_to_run(batch["advantages"], always=1))
    again = outcome(trainer, "packed", tokens)
    hook.remove()
    lengths = (silent["prompt_mask"].sum(1) + silent["completion_mask"].sum(1)).tolist()
    assert sum(forwarded) == sum(lengths[row] for row in (0, 1, 8, 11)) < 0.5 * plain  # row 3 has no completion
    assert again[0] == pytest.approx(loss, rel=1e-4, abs=1e-7)
    assert float((again[1] - gradient).norm() / gradient.norm()) < 1e-4
    assert again[2].keys() == metrics.keys()
    assert again[2]["entropy"] == pytest.approx(metrics["entropy"], rel=0.05), "of the rows that were run"
