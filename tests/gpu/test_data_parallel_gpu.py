"""Two learners of a distill stage over NCCL, each on a card, against one."""

import pytest
import torch
from test_distill import distil, folders, recipe  # noqa: F401 (a fixture)
from test_weight_sync_gpu import ray_gpu  # noqa: F401 (a fixture)

from kimi_rl import pipeline
from kimi_rl.run_dir import RunDir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA cards"),
    pytest.mark.timeout(400),
]


@pytest.mark.parametrize("match", ["layers", "logits"])
def test_two_learners_make_the_steps_of_one(ray_gpu, folders, tmp_path, match):  # noqa: F811
    stage = {"match": match, "steps": 6, "batch_tokens": 1024, "optimizer": "adamw", "perplexity_every": 0}
    pipeline.train(recipe(folders, **stage, learners=2), tmp_path / "two")
    _, _, alone = distil(folders, tmp_path / "one", device="cuda", **stage)
    one, two = (
        [row for row in rows if row["type"] == "train"] for rows in (alone, RunDir(tmp_path / "two").read_metrics())
    )
    assert [row["step"] for row in two] == list(range(1, 7))
    for left, right in zip(one, two, strict=True):  # bf16: sums in another order
        assert right["loss"] == pytest.approx(left["loss"], rel=0.02)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=0.1)
    assert two[-1]["loss"] < two[0]["loss"]
