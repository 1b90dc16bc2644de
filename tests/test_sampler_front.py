"""What stands in front of vLLM's sampler, on stand-ins for the two runners: a card is needed for the real ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from kimi_rl.kernels.keyed_draw import keyed_draw
from kimi_rl.rollout.vllm_plugin.lean_logprobs import MARK, LeanLogprobs
from kimi_rl.rollout.vllm_plugin.sampler_front import SEED, HostPath, SamplerFront, _front_v2, attach

VOCABULARY, ROWS = 300, 6


def plain_output(logits):
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput

    ids = logits.argmax(-1, keepdim=True).int()
    return SamplerOutput(ids, LogprobsTensors(ids, logits.gather(-1, ids.long()), ids[:, 0].long()))


def runner_of(marks, prompt=7):
    """A V1 runner whose batch holds a request per element of `marks`, its `extra_args`."""
    from vllm.v1.sample.sampler import Sampler

    names = [f"r{i}" for i in range(len(marks))]
    sampler = SimpleNamespace(
        forward=lambda logits, sampling_metadata: plain_output(logits), apply_temperature=Sampler.apply_temperature
    )
    return SimpleNamespace(
        device=torch.device("cpu"),
        sampler=sampler,
        seq_lens=torch.arange(prompt, prompt + 32, dtype=torch.int32),
        input_batch=SimpleNamespace(req_ids=names),
        requests={
            name: SimpleNamespace(sampling_params=SimpleNamespace(extra_args=mark))
            for name, mark in zip(names, marks, strict=True)
        },
    )


def metadata(count=ROWS, **changes):
    fields = dict(all_random=True, max_num_logprobs=0, top_p=None, top_k=None, temperature=torch.full((count,), 0.7))
    return SimpleNamespace(**fields | changes)


def seeded(count=ROWS):
    return [{MARK: True, SEED: 2**40 + 11 * i} for i in range(count)]


def test_seeded_rows_are_drawn_by_seed_and_length():
    logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    runner, about = runner_of(seeded()), metadata()
    SamplerFront(runner, keyed=True)
    found = runner.sampler.forward(logits=logits.clone(), sampling_metadata=about)
    seeds = torch.tensor([mark[SEED] for mark in seeded()])
    tokens, logprobs = keyed_draw(logits, seeds, torch.arange(7, 7 + ROWS), about.temperature)
    assert torch.equal(found.sampled_token_ids, tokens[:, None]) and found.sampled_token_ids.dtype == torch.int32
    assert torch.equal(found.logprobs_tensors.values, logprobs)
    # The next step of the same batch draws anew; a batch in another order draws the same for each request.
    runner.seq_lens += 1
    later = runner.sampler.forward(logits=logits.clone(), sampling_metadata=about)
    assert not torch.equal(later.sampled_token_ids, found.sampled_token_ids)
    runner.seq_lens = runner.seq_lens[:ROWS].flip(0) - 1
    runner.input_batch.req_ids = runner.input_batch.req_ids[::-1]
    turned = runner.sampler.forward(logits=logits.flip(0), sampling_metadata=metadata())
    assert torch.equal(turned.sampled_token_ids.flip(0), found.sampled_token_ids)


def test_top_p_is_applied_before_the_draw():
    logits = torch.tensor([[2.0, 1.9, 0.0, -1.0]]).repeat(64, 1)
    runner = runner_of(seeded(64))
    runner.seq_lens = torch.arange(64, dtype=torch.int32)
    SamplerFront(runner, keyed=True)
    found = runner.sampler.forward(
        logits=logits.clone(), sampling_metadata=metadata(64, top_p=torch.full((64,), 0.8))
    )
    tokens = found.sampled_token_ids[:, 0].long()
    assert set(tokens.tolist()) == {0, 1}
    kept = (logits[0, :2] / 0.7).log_softmax(-1)
    torch.testing.assert_close(found.logprobs_tensors.values, kept[tokens])


@pytest.mark.parametrize(
    ("marks", "changes"),
    [
        ([*seeded(5), {MARK: True}], {}),
        ([*seeded(5), None], {}),
        (seeded(), {"all_random": False}),
        (seeded(), {"max_num_logprobs": 3}),
    ],
)
def test_a_seed_is_never_lost_in_silence(marks, changes):
    runner = runner_of(marks)
    SamplerFront(runner, keyed=True)
    with pytest.raises(RuntimeError, match="seeds would be lost"):
        runner.sampler.forward(logits=torch.randn(ROWS, VOCABULARY), sampling_metadata=metadata(**changes))


def test_rows_that_do_not_fit_the_batch():
    runner = runner_of(seeded())
    SamplerFront(runner, keyed=True)
    with pytest.raises(RuntimeError, match="9 rows of logits for 6 requests"):
        runner.sampler.forward(logits=torch.randn(9, VOCABULARY), sampling_metadata=metadata())


def test_others_get_vllms_own_tensors():
    logits = torch.randn(2, VOCABULARY)
    for marks, lean in (([{MARK: True}, None], False), ([{MARK: True}] * 2, True), ([None, None], False)):
        runner = runner_of(marks)
        SamplerFront(runner, keyed=True)
        found = runner.sampler.forward(logits=logits, sampling_metadata=metadata(2)).logprobs_tensors
        assert isinstance(found, LeanLogprobs) == lean
        values = found.values if lean else found.logprobs[:, 0]
        assert torch.equal(values, logits.amax(-1))


def test_the_second_runner_knows_requests_by_slots():
    class Sampler:
        def __init__(self):
            self.added = []

        def __call__(self, logits, input_batch):
            return plain_output(logits)

        def add_request(self, slot, prompt_len, sampling_params):
            self.added.append(slot)

    runner = SimpleNamespace(max_num_reqs=8, sampler=Sampler())
    _front_v2(runner)
    for slot, mark in ((5, {MARK: True}), (2, {MARK: True}), (3, None)):
        runner.sampler.add_request(slot, 4, SimpleNamespace(extra_args=mark))
    assert runner.sampler.added == [5, 2, 3]
    logits = torch.randn(2, VOCABULARY)
    for slots, lean in (([5, 2], True), ([5, 3], False)):
        found = runner.sampler(logits, SimpleNamespace(idx_mapping_np=np.array(slots, dtype=np.int32)))
        assert isinstance(found.logprobs_tensors, LeanLogprobs) == lean
    runner.sampler.add_request(5, 4, SimpleNamespace(extra_args=None))  # the slot's next request
    found = runner.sampler(logits, SimpleNamespace(idx_mapping_np=np.array([5, 2], dtype=np.int32)))
    assert not isinstance(found.logprobs_tensors, LeanLogprobs)


def test_a_vllm_built_otherwise_keeps_its_own_way(caplog, monkeypatch):
    assert attach(SimpleNamespace(llm_engine=SimpleNamespace())) == HostPath()
    assert len(caplog.records) == 1 and "this vLLM is built otherwise" in caplog.text
    assert HostPath().request_arguments(5, greedy=False) == {"logprobs": 0, "seed": 5, "extra_args": None}
    keyed = HostPath(lean=True, keyed=True)
    assert keyed.request_arguments(5, greedy=False)["extra_args"] == {MARK: True, SEED: 5}
    assert keyed.request_arguments(5, greedy=True) == {"logprobs": 0, "seed": 5, "extra_args": {MARK: True}}
    monkeypatch.setenv("KIMI_RL_KEYED_SAMPLING", "0")
    assert keyed.request_arguments(5, greedy=False) == {"logprobs": 0, "seed": 5, "extra_args": {MARK: True}}
