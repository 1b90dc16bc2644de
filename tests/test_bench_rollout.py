"""The parts of `kimi-rl bench rollout`: its figures by hand, its child process, and what it refuses."""

import threading
from multiprocessing import Pipe

import numpy as np
import pytest
from runs import run_inside

from kimi_rl.bench import rollout
from kimi_rl.bench.rollout_arm import _serve
from kimi_rl.bench.rollout_beside import OFF, ratio_interval, side_by_side, tokens_needed
from kimi_rl.bench.rollout_model import BLOCK, cache_bytes
from kimi_rl.model.cost import sequence_bytes
from kimi_rl.model.presets import build_config
from kimi_rl.recipe import ModelSection
from kimi_rl.rollout.vllm_plugin import KDA_STEP


class Arm:
    """An arm with canned answers, by temperature."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def ask(self, order, **values):
        self.asked.append(values)

    def answer(self):
        return self.answers[self.asked[-1]["temperature"]]

    def do(self, order, **values):
        self.ask(order, **values)
        return self.answer()


def test_throughput_of_engines_side_by_side():
    alone = rollout._row([{"seconds": [0.3, 0.2, 0.9], "gpu_s": 0.001}], size=64, steps=100)
    assert alone["step_s"] == pytest.approx(0.003) and alone["gpu_s"] == 0.001
    assert alone["tokens_per_s"] == pytest.approx(64 / 0.003)
    both = rollout._row([{"seconds": [0.4]}, {"seconds": [0.2]}], size=64, steps=100)
    assert both["tokens_per_s"] == pytest.approx(64 / 0.004 + 64 / 0.002) and "gpu_s" not in both


def test_stock_vllm_has_vllms_kda_layers_whatever_the_environment_says_for_ours():
    assert rollout._OFF[KDA_STEP] == "0" and KDA_STEP not in rollout.all_on("v1") | rollout.all_on("v2")


class Beside:
    """An engine whose windows take `seconds`, ten times that without the switch and twice that beside others."""

    def __init__(self, seconds, log):
        self.seconds, self.log, self.on = seconds, log, None

    def do(self, order, **values):
        self.ask(order, **values)
        return self.answer()

    def ask(self, order, **values):
        self.log.append((self, order, values.get("start_at", 0.0) > 0))
        if order == "set":
            self.on = values["environment"] == {OFF: "1"}
        seconds = self.seconds * (1 if self.on else 10) * (2 if values.get("start_at") else 1)
        timed = {"seconds": [seconds] * values.get("windows", 0), "gpu_s": 0.5}
        self.answers = timed if order == "timed" else []

    def answer(self):
        return self.answers


def test_windows_of_two_models_alternate():
    log = []
    a, b = [Beside(0.2, log), Beside(0.4, log)], [Beside(0.1, log), Beside(0.1, log)]
    first, other = side_by_side({"a": a, "b": b}, size=64, steps=100, windows=2, gpu=True)
    assert first["tokens_per_s"] == pytest.approx(64 / 0.003) and first["gpu_s"] == 0.5  # the median of both engines
    assert first["seconds"] == [[0.2, 0.2], [0.4, 0.4]] and first["ratio_to_first"] == 1.0
    assert other["ratio_to_first"] == pytest.approx(3.0)
    low, high = other["ratio_to_first_interval"]
    assert low < 3.0 < high and first["together_ratio_to_first_interval"][0] <= 1.0
    assert first["undisturbed_step_s"] == pytest.approx(0.002)  # by the fastest windows
    assert other["undisturbed_ratio_to_first"] == pytest.approx(2.0)
    low, high = other["undisturbed_ratio_to_first_interval"]
    assert low == pytest.approx(2.0) and high == pytest.approx(4.0)  # only slow windows of the first: one draw in 16
    assert other["without"]["step_s"] == pytest.approx(0.01)
    assert first["together"]["tokens_per_s"] == pytest.approx(64 / 0.004 + 64 / 0.008)
    assert other["together_ratio_to_first"] == pytest.approx(2 * 64 / 0.002 / (64 / 0.004 + 64 / 0.008))
    alone = [arm for arm, order, beside in log if order == "timed" and not beside]
    assert alone[:8] == [a[0], b[0], b[1], a[1]] * 2 and alone[8:12] == [b[0], a[0], a[1], b[1]]
    assert [arm for arm, order, beside in log if beside] == [*a, *b, *b, *a]
    assert tokens_needed(100, 2) > 4 * 105 + 2 * 155 + 20


def test_comparison_counts_sequences_that_differ():
    same, other = ([5, 6], [-1.0, -2.0]), ([5, 7], [-1.0, -2.5])
    near = ([5, 6], [-1.0, -2.25])
    stock = Arm({0.0: [same, same, same], 1.0: [same, same, other]})
    ours = Arm({0.0: [near, other, same], 1.0: [other, other, other]})
    found = rollout._compare(stock, ours, [[1] * BLOCK] * 3, seed=0)
    assert found["greedy_equal"] == 2 and found["greedy_largest_logprob_difference"] == 0.25
    assert found["sampled"]["stock"]["mean_logprob"] == pytest.approx((-1.5 - 1.5 - 1.75) / 3)
    assert found["sampled"]["ours"] == {"mean_logprob": -1.75, "standard_error": 0.0}
    assert found["sampled_equal_when_repeated"] == 3 and found["across_a_block_border"] == 3
    assert stock.asked[0] == ours.asked[0] and len(stock.asked) == 2 and len(ours.asked) == 3


def test_the_cache_holds_the_sequences_it_is_for():
    """Pages of one size: at 8 heads of 128 a block of 480 tokens takes more than a KDA layer's states."""
    for arch in ("hybrid", "mla"):
        config = build_config(
            ModelSection(arch=arch, size="base"), vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
        found = cache_bytes(config, 256, 1500)
        assert 256 * sequence_bytes(config, 1500).total < found < 12 * 2**30
        assert cache_bytes(config, 512, 1500) > 1.8 * found


def test_an_engine_that_cannot_start_says_why():
    mine, theirs = Pipe()
    settings = {"model_folder": "/nowhere", "max_model_len": 8, "max_num_seqs": 2}
    pytest.importorskip("vllm")
    thread = threading.Thread(target=_serve, args=(theirs, settings))
    thread.start()
    assert mine.poll(120)
    good, text = mine.recv()
    thread.join()
    assert not good and "/nowhere has no config.json" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["hybrid:tiny", "--beside", "/nowhere"], "MODEL /nowhere: no config.json"),
        (["hybrid:tiny", "--beside", "hybrid:tiny"], "--beside: found hybrid:tiny, the model itself"),
        (["hybrid:tiny", "--batch", "4,x"], "--batch: found '4,x'"),
        (["hybrid:tiny", "--runner", "v3"], "--runner: found 'v3'"),
        (["/nowhere"], "MODEL /nowhere: no config.json"),
    ],
)
def test_bad_input(arguments, expected):
    done = run_inside("bench", "rollout", *arguments)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1


def test_the_interval_of_a_ratio_holds_it_as_often_as_it_says():
    draw = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        ours, theirs = draw.normal(1.1, 0.2, 24), draw.normal(1.0, 0.2, 24)
        low, high = ratio_interval(ours.tolist(), theirs.tolist(), resamples=400)
        hits += low <= 1.1 <= high
    assert 180 <= hits <= 200
