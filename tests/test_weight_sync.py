"""Weight sync: complete and verified, or an error; never a mixture."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from kimi_rl.errors import InputError
from kimi_rl.model.load_save import load_model
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.pipeline import check_cards
from kimi_rl.recipe import RLVRStage, RolloutSection
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.rollout.pool import pool_settings
from kimi_rl.rollout.transformers_engine import TransformersEngine
from kimi_rl.weight_sync import (
    ChecksumBatch,
    CudaIpcSync,
    NcclSync,
    ObjectStoreSync,
    WeightSyncError,
    WeightUpdate,
    apply_update,
    checksum,
    checksum_all,
    make_sync,
    tensor_checksum,
    transports,
    unpack,
    whole_layers,
)

PROBE = [Request([20, 30, 40], 0)]
GREEDY = SamplingParams(4, 0.0)


def changed_model(folder, seed):
    torch.manual_seed(seed)
    model = load_model(str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.add_(torch.randn_like(buffer))
    return model


def update_of(model, version):
    """A `WeightUpdate` with its buckets in place of references: the receiving side takes both."""
    weights = [(name, tensor.detach().clone()) for name, tensor in to_checkpoint(model)]
    return WeightUpdate(version, list(whole_layers(weights)), {n: tensor_checksum(t) for n, t in weights})


@pytest.fixture(params=[("hybrid", "dense"), ("hybrid", "moe"), ("mla", "dense")], ids=str)
def folder(request, tiny_models):
    return tiny_models[request.param]


def test_update_reaches_every_tensor(folder):
    engine = TransformersEngine(str(folder), policy_version=0)
    model = changed_model(folder, 1)
    before = engine.generate(PROBE, GREEDY)[0].logprobs
    apply_update(engine, update_of(model, 1))
    assert engine.policy_version == 1
    assert engine.checksums() == {n: tensor_checksum(t) for n, t in to_checkpoint(model)}
    assert engine.generate(PROBE, GREEDY)[0].logprobs != before


def drop_one(update):
    buckets = [list(b) for b in update.buckets]
    buckets[1] = buckets[1][1:]
    return dataclasses.replace(update, buckets=buckets)


def drop_from_manifest_too(update):
    name = update.buckets[1][0][0]
    checksums = {n: c for n, c in update.checksums.items() if n != name}
    return dataclasses.replace(drop_one(update), checksums=checksums)


def corrupt_one(update):
    buckets = [list(b) for b in update.buckets]
    name, tensor = buckets[2][0]
    damaged = tensor.clone()
    damaged.view(-1)[0] += 1
    buckets[2][0] = (name, damaged)
    return dataclasses.replace(update, buckets=buckets)


def stale_shard(update):
    """One shard of what engines fuse (q, k, v) keeps its old value."""
    buckets = [list(b) for b in update.buckets]
    bucket, row = next(
        (b, i)
        for b in buckets
        for i, (n, _) in enumerate(b)
        if n.endswith(("self_attn.k_proj.weight", "kv_b_proj.weight"))
    )
    bucket[row] = (bucket[row][0], torch.zeros_like(bucket[row][1]))
    return dataclasses.replace(update, buckets=buckets)


def old_version(update):
    return dataclasses.replace(update, version=0)


@pytest.mark.parametrize("fault", [drop_one, drop_from_manifest_too, corrupt_one, stale_shard, old_version])
def test_faulty_updates_are_refused_and_never_served(folder, fault):
    engine = TransformersEngine(str(folder), policy_version=0)
    good = update_of(changed_model(folder, 2), 1)
    with pytest.raises((WeightSyncError, ValueError, KeyError)):
        apply_update(engine, fault(good))
    assert engine.policy_version == 0
    if fault is not old_version:  # an out-of-order update is refused before anything is touched
        with pytest.raises(RuntimeError, match="incomplete"):
            engine.generate(PROBE, GREEDY)
    apply_update(engine, good)
    assert len(engine.generate(PROBE, GREEDY)[0].token_ids) >= 1


def test_router_bias_not_sent_is_detected(tiny_models):
    folder = tiny_models["hybrid", "moe"]
    engine = TransformersEngine(str(folder), policy_version=0)
    model = changed_model(folder, 3)
    weights = [(n, t) for n, t in to_checkpoint(model) if "e_score_correction_bias" not in n]
    assert len(weights) < len(list(to_checkpoint(model)))
    update = WeightUpdate(1, list(whole_layers(weights)), {n: tensor_checksum(t) for n, t in weights})
    with pytest.raises((WeightSyncError, ValueError, KeyError)):
        apply_update(engine, update)
    assert engine.policy_version == 0


def test_checksum_sees_values_order_dtype_and_shape():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    base = tensor_checksum(x)
    swapped = x.clone()
    swapped[0], swapped[1] = x[1], x[0]
    nudged = x.clone()
    nudged[3, 3] = torch.nextafter(nudged[3, 3], torch.tensor(9.0))
    others = [swapped, nudged, x.double(), x.reshape(5, 7), x.bfloat16()]
    assert len({base, *map(tensor_checksum, others)}) == 6
    assert tensor_checksum(x.clone()) == base
    assert tensor_checksum(x.bfloat16()[:, :3]) == tensor_checksum(x.bfloat16()[:, :3].contiguous())


def odd_tensors():
    """Every dtype, sizes around a row of the batched sum, views that are not contiguous or not word-aligned."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(7, 5), (), (0, 4), (1,), (1023,), (1024,), (1025,), (3, 1024), (130, 701)]
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool]
    for shape in shapes:
        for dtype in dtypes:
            yield f"{shape} {dtype}", (torch.randn(shape, generator=generator) * 50).to(dtype)
    matrix = torch.randn(40, 60, generator=generator).bfloat16()
    yield from {"columns": matrix[:, 1:], "rows": matrix[1:], "transposed": matrix.T}.items()
    yield from {"unaligned": matrix.view(-1)[1:], "unaligned, whole words": matrix.view(-1)[1:5]}.items()


@pytest.mark.parametrize("group", [1 << 24, 1 << 17, 1 << 12])
def test_batched_checksums_equal_the_definition(monkeypatch, group):
    monkeypatch.setitem(checksum._GROUP, "cpu", group)  # small: tensors are cut, and sums put together
    expected = {name: tensor_checksum(tensor) for name, tensor in odd_tensors()}
    assert checksum_all(odd_tensors()) == expected
    assert len(set(expected.values())) == len(expected)


def test_a_name_has_one_checksum():
    batch = ChecksumBatch()
    batch.add("w", torch.zeros(2))
    with pytest.raises(ValueError, match="w is listed twice"):
        batch.add("w", torch.zeros(2))


def test_whole_layers_keeps_layers_together():
    names = ["model.embed_tokens.weight", "model.layers.0.a", "model.layers.0.b", "model.layers.10.a", "lm_head.weight"]
    groups = [[n for n, _ in g] for g in whole_layers((n, torch.zeros(1)) for n in names)]
    assert groups == [names[:1], names[1:3], names[3:4], names[4:]]


def test_object_store_transport(ray_local, tiny_models):
    folder = tiny_models["hybrid", "dense"]
    model = changed_model(folder, 4)
    transport = make_sync("auto", None, learner_card=None, worker_cards={None})
    assert isinstance(transport, ObjectStoreSync)
    update, times = transport.pack(to_checkpoint(model), 3)
    assert times.bytes == sum(t.numel() * t.element_size() for _, t in to_checkpoint(model))
    engine = TransformersEngine(str(folder), policy_version=2)
    apply_update(engine, update)
    assert engine.policy_version == 3


@pytest.fixture
def ipc_on_cpu(monkeypatch):
    """CUDA IPC without CUDA: a handle is the buffer itself. Everything but the mapping is as on a card."""
    monkeypatch.setattr(transports, "export_buffer", lambda buffer: buffer)
    monkeypatch.setattr(transports, "import_buffer", lambda buffer: buffer)


def test_ipc_staging_carries_every_tensor_and_version(ipc_on_cpu, folder):
    engine = TransformersEngine(str(folder), policy_version=0)
    sync = CudaIpcSync()
    for version in (1, 2):
        model = changed_model(folder, version)
        update, times = sync.pack(to_checkpoint(model), version)
        assert times.bytes == sum(t.numel() * t.element_size() for _, t in to_checkpoint(model))
        with torch.no_grad():  # the learner's next optimizer step must not reach what was packed
            sent = {n: t.clone() for n, t in to_checkpoint(model)}
            for parameter in model.parameters():
                parameter.zero_()
        apply_update(engine, update)
        assert engine.policy_version == version
        assert all(torch.equal(t, sent[n]) for n, t in to_checkpoint(engine.model))


def test_a_buffer_overwritten_too_early_is_detected(ipc_on_cpu, folder):
    engine = TransformersEngine(str(folder), policy_version=0)
    sync = CudaIpcSync()
    update, _ = sync.pack(to_checkpoint(changed_model(folder, 1)), 1)
    newer, _ = sync.pack(to_checkpoint(changed_model(folder, 2)), 2)
    with pytest.raises(WeightSyncError, match="arrived with a wrong checksum"):
        apply_update(engine, update)
    apply_update(engine, newer)


def test_what_went_wrong_is_said(folder):
    engine = TransformersEngine(str(folder), policy_version=0)
    good = update_of(changed_model(folder, 2), 1)
    with pytest.raises(WeightSyncError, match="arrived with a wrong checksum"):
        apply_update(engine, corrupt_one(good))
    load = engine.load_weights
    engine.load_weights = lambda weights: load((n, t * 0 if n == "model.norm.weight" else t) for n, t in weights)
    with pytest.raises(WeightSyncError, match="model.norm.weight is different in the engine after loading"):
        apply_update(engine, good)


@pytest.mark.parametrize("transport", [ObjectStoreSync, CudaIpcSync])
def test_tensors_travel_in_the_dtype_that_is_served(ipc_on_cpu, ray_local, tiny_models, transport):
    weights = list(to_checkpoint(changed_model(tiny_models["hybrid", "moe"], 5)))
    served = {name: torch.bfloat16 for name, _ in weights} | {"lm_head.weight": torch.float32}
    update, times = transport(served).pack(weights, 1)
    kept = (".A_log", ".dt_bias", "_conv1d.weight", ".e_score_correction_bias")
    arrived = dict(unpack(update))
    assert list(arrived) == [name for name, _ in weights]
    for name, tensor in weights:
        exact = name == "lm_head.weight" or name.endswith(kept)
        assert torch.equal(arrived[name], tensor if exact else tensor.bfloat16()), name
        assert arrived[name].dtype == (torch.float32 if exact else torch.bfloat16)
        assert tensor_checksum(arrived[name]) == update.checksums[name]
    assert times.bytes == sum(t.numel() * t.element_size() for t in arrived.values())


def test_choice_of_a_transport():
    one, other = "card-1", "card-2"
    for kind, cards, expected in [
        ("auto", {one}, CudaIpcSync),
        ("auto", {one, other}, NcclSync),
        ("auto", {other}, NcclSync),
        ("nccl", {other}, NcclSync),
        ("auto", {one, None}, ObjectStoreSync),
        ("auto", {None}, ObjectStoreSync),
        ("object_store", {one}, ObjectStoreSync),
        ("cuda_ipc", {one}, CudaIpcSync),
    ]:
        sync = make_sync(kind, None, learner_card=one, worker_cards=cards)
        assert type(sync) is expected
        sync.close()
    with pytest.raises(InputError, match="cuda_ipc needs .* workers on card-1, card-2"):
        make_sync("cuda_ipc", None, learner_card=one, worker_cards={one, other})
    with pytest.raises(InputError, match="cuda_ipc needs"):
        make_sync("cuda_ipc", None, learner_card=None, worker_cards={None})
    for learner, workers in ((one, {one}), (None, {None}), (one, {None, other})):
        with pytest.raises(InputError, match="nccl needs .* several NVIDIA cards; here .* workers on (card|the CPU)"):
            make_sync("nccl", None, learner_card=learner, worker_cards=workers)
    for kind in ("cuda_ipc", "nccl"):
        with pytest.raises(InputError, match=f"{kind} needs .* this run is on a CPU"):
            pool_settings(
                RolloutSection(weight_sync=kind), model_folder="", max_model_len=8, seed=0, threads=1, device="cpu"
            )


def test_cards_of_their_own():
    settings = dict(model_folder="", max_model_len=8, seed=0, threads=1, device="cuda")
    for workers, cards, gpus, memory in [(2, 0, 0.25, 0.2), (2, 2, 1.0, 0.8), (2, 1, 0.5, 0.4), (3, 2, 0.5, 0.4)]:
        made = pool_settings(RolloutSection(workers=workers, cards=cards), **settings)
        assert made["num_gpus"] == gpus
        assert made["engine_args"] == {"gpu_memory_utilization": pytest.approx(memory)}
    with pytest.raises(ValueError, match=r"cards \(2\) must not exceed workers \(1\)"):
        RolloutSection(cards=2)
    stage = RLVRStage(kind="rlvr", name="first", steps=1, rollout=RolloutSection(workers=2, cards=2))
    recipe = SimpleNamespace(stages=[stage])
    check_cards(recipe, 3, "cuda")
    with pytest.raises(InputError, match=r"stages.first.rollout.cards: 2 for .* use 2 whole NVIDIA cards"):
        check_cards(recipe, 2, "cuda")


def test_a_prefix_cache_that_is_not_reset(tiny_models):
    pytest.importorskip("vllm")
    if torch.cuda.is_available():
        pytest.skip("the CPU plugin is inert on a GPU")
    from kimi_rl.rollout.vllm_engine import VLLMEngine

    folder = tiny_models["mla", "dense"]
    engine = VLLMEngine(str(folder), max_model_len=64, max_num_seqs=2)
    model = changed_model(folder, 1)
    reset = engine._llm.reset_prefix_cache
    try:
        # vLLM has no prefix cache for MLA on a CPU, so the answer of one that cannot be emptied is given in its place.
        engine._llm.llm_engine.vllm_config.cache_config.enable_prefix_caching = True
        engine._llm.reset_prefix_cache = lambda: False
        with pytest.raises(WeightSyncError, match="kept its prefix cache"):
            apply_update(engine, update_of(model, 1))
        with pytest.raises(RuntimeError, match="incomplete"):
            engine.generate(PROBE, GREEDY)
        engine._llm.reset_prefix_cache = reset
        apply_update(engine, update_of(model, 1))
        assert engine.generate(PROBE, GREEDY)[0].policy_version == 1
    finally:
        engine.close()
