"""Several learners of a distill stage: real Ray actors over gloo make the steps that one makes, or end in one error."""

import threading
import time

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from test_distill import distil, folders, recipe  # noqa: F401 (a fixture)

from kimi_rl import pipeline
from kimi_rl.errors import InputError, RunError
from kimi_rl.learner.data_parallel import Place, TrainingGroup
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.pipeline import check_cards
from kimi_rl.run_dir import RunDir

pytestmark = pytest.mark.timeout(240)
# Four rows a step. Not Muon, whose bf16 makes much of the order of a sum.
STAGE = {"batch_tokens": 1024, "optimizer": "adamw", "perplexity_every": 2, "learning_rate": 5e-3}


def assert_same_steps(alone, out):
    """The model and the rows of `distil`, and those of the run in `out`."""
    _, context, rows = alone
    found = RunDir(out).read_metrics()
    one, two = ([row for row in some if row["type"] == "train"] for some in (rows, found))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-3)
        tokens = [row["tokens_per_s"] * row["step_s"] for row in (left, right)]
        assert tokens[1] == pytest.approx(tokens[0], rel=1e-6)
    one, two = ([row["student_perplexity"] for row in some if row["type"] == "eval"] for some in (rows, found))
    assert two == pytest.approx(one, rel=1e-4)
    start = load_file(context.job.start_model + "/model.safetensors")
    trained = load_file(out / "model" / "model.safetensors")
    moved = 0
    for name, value in to_checkpoint(context.model):
        distance = (value - start[name]).norm()
        assert (trained[name] - value).norm() <= 1e-3 * distance, name
        moved += distance > 0
    assert moved


@pytest.mark.parametrize("match", ["layers", "logits"])
def test_two_learners_make_the_steps_of_one(ray_local, folders, tmp_path, match):  # noqa: F811
    stage = STAGE | {"match": match, "steps": 4}
    pipeline.train(recipe(folders, **stage, learners=2), tmp_path / "two")
    assert_same_steps(distil(folders, tmp_path / "one", **stage), tmp_path / "two")


def test_a_learner_that_dies_ends_the_run_and_resume_goes_on(ray_local, folders, tmp_path):  # noqa: F811
    stage = STAGE | {"match": "logits", "steps": 40, "checkpoint_every": 2, "perplexity_every": 0}
    out = tmp_path / "killed"

    def kill():
        """The one that follows, once a checkpoint is whole."""
        while not list(out.glob("stages/*/checkpoints/checkpoint-*/complete.json")):
            time.sleep(0.02)
        raylet = ray._private.worker.global_worker.node.all_processes["raylet"][0].process.pid
        learners = [p for p in psutil.Process(raylet).children() if "Learner" in p.name() + " ".join(p.cmdline())]
        assert len(learners) == 2
        max(learners, key=lambda p: p.create_time()).kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(RunError, match="beside this one is gone.*--resume"):
        pipeline.train(recipe(folders, **stage, learners=2), out)
    killer.join(timeout=60)
    assert not killer.is_alive()
    pipeline.train(recipe(folders, **stage, learners=2), out, resume=True)
    assert_same_steps(distil(folders, tmp_path / "alone", **stage), out)


def test_bad_numbers_of_learners_are_refused(folders):  # noqa: F811
    with pytest.raises(ValueError, match="4 rows.*3 learners cannot divide.*multiple of 768"):
        recipe(folders, **STAGE, match="layers", learners=3)
    with pytest.raises(ValueError, match="several cannot evaluate"):
        recipe(folders, **STAGE, match="layers", learners=2, eval={"k": 1})
    two = recipe(folders, **STAGE, match="layers", learners=2)
    check_cards(two, 2, "cuda")
    check_cards(two, 0, "cpu")  # processes that share the cores
    with pytest.raises(InputError, match="stages.distill.learners: 2, a card each.*1 whole"):
        check_cards(two, 1, "cuda")


def test_one_learner_averages_with_nobody():
    value = torch.tensor([1.0, 2.0])
    TrainingGroup(Place()).average([value])
    assert value.tolist() == [1.0, 2.0]
