"""Weight sync: complete and verified, or an error; never a mixture."""

import dataclasses

import pytest
import torch

from kimi_rl.model.load_save import load_model
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.rollout.transformers_engine import TransformersEngine
from kimi_rl.weight_sync import (
    ObjectStoreSync,
    WeightSyncError,
    WeightUpdate,
    apply_update,
    tensor_checksum,
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


def test_whole_layers_keeps_layers_together():
    names = ["model.embed_tokens.weight", "model.layers.0.a", "model.layers.0.b", "model.layers.10.a", "lm_head.weight"]
    groups = [[n for n, _ in g] for g in whole_layers((n, torch.zeros(1)) for n in names)]
    assert groups == [names[:1], names[1:3], names[3:4], names[4:]]


def test_object_store_transport(ray_local, tiny_models):
    folder = tiny_models["hybrid", "dense"]
    model = changed_model(folder, 4)
    update, times = ObjectStoreSync().pack(to_checkpoint(model), 3)
    assert times.bytes == sum(t.numel() * t.element_size() for _, t in to_checkpoint(model))
    engine = TransformersEngine(str(folder), policy_version=2)
    apply_update(engine, update)
    assert engine.policy_version == 3
