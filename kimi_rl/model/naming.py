"""Names and shapes: transformers' modules <-> the published checkpoint layout, which vLLM loads.

| transformers                                   | checkpoint                                            |
|------------------------------------------------|-------------------------------------------------------|
| self_attn.forget_gate.{f_a_proj,A_log,...}     | self_attn.{f_a_proj,A_log,...}                        |
| self_attn.conv1d.weight [3P, 1, W]             | self_attn.{q,k,v}_conv1d.weight, [P, 1, W] each       |
| mlp.* of a mixture-of-experts layer            | block_sparse_moe.*                                    |
| mlp.experts.gate_up_proj [E, 2I, D]            | block_sparse_moe.experts.E.{w1,w3}.weight, [I, D] each |
| mlp.experts.down_proj [E, D, I]                | block_sparse_moe.experts.E.w2.weight [D, I]           |

The map is written out here, rather than taken from transformers' conversion machinery, because weight sync
needs it layer by layer and as views; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, groupby

import torch

from kimi_rl.model.stock import hf


def to_checkpoint(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, tensor) of every parameter and buffer of a `KimiLinearForCausalLM`.

    Tensors are detached views of the model's own storage, in its dtypes: copy them before the next optimizer
    step if they must not change. Everything of one layer is adjacent; the embedding comes first, norm and
    head last. The router's bias, which is a buffer, is included; a head tied to the embedding is not
    repeated.
    """
    tied = model.config.tie_word_embeddings
    layers = model.model.layers
    yield "model.embed_tokens.weight", model.model.embed_tokens.weight.detach()
    for index, layer in enumerate(layers):
        moe = isinstance(layer.mlp, hf.KimiLinearMoE)
        for name, tensor in chain(layer.named_parameters(), layer.named_buffers()):
            for new_name, view in _layer_tensor(name, tensor.detach(), moe):
                yield f"model.layers.{index}.{new_name}", view
    yield "model.norm.weight", model.model.norm.weight.detach()
    if not tied:
        yield "lm_head.weight", model.lm_head.weight.detach()


def _layer_tensor(name: str, tensor: torch.Tensor, moe: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Checkpoint names of one tensor of a layer; `name` is relative to the layer."""
    if name == "self_attn.conv1d.weight":
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"self_attn.{letter}_conv1d.weight", part
    elif name == "mlp.experts.gate_up_proj":
        for expert, matrix in enumerate(tensor):
            w1, w3 = matrix.chunk(2)
            yield f"block_sparse_moe.experts.{expert}.w1.weight", w1
            yield f"block_sparse_moe.experts.{expert}.w3.weight", w3
    elif name == "mlp.experts.down_proj":
        for expert, matrix in enumerate(tensor):
            yield f"block_sparse_moe.experts.{expert}.w2.weight", matrix
    elif moe and name.startswith("mlp."):
        yield "block_sparse_moe." + name.removeprefix("mlp."), tensor
    else:
        yield name.replace("self_attn.forget_gate.", "self_attn."), tensor


def layer_of(name: str) -> str:
    """The group a checkpoint name belongs to: "model.layers.7" for a layer's tensor, else the name itself."""
    return ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name


@torch.no_grad()
def load_into(model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors under checkpoint names into `model`, in place, each cast to the dtype it has there.

    `weights` may be a stream; only one layer of it is held at a time. All tensors of a layer must be
    adjacent, and a layer is copied only when it is complete. `A_log` may have any shape with the right number
    of elements (some checkpoints store [H], some [1, 1, H, 1]). Raises `ValueError` on an unknown, repeated,
    missing or mis-shaped tensor; layers copied before the error keep their new values, so the model must not
    be used then.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, target in to_checkpoint(model):
        waiting.setdefault(layer_of(name), {})[name] = target
    known = {name for group in waiting.values() for name in group}
    for group, items in groupby(weights, key=lambda item: layer_of(item[0])):
        received: dict[str, torch.Tensor] = {}
        for name, tensor in items:
            if name not in known:
                raise ValueError(f"load_into: {name} is no tensor of this model")
            if name in received or group not in waiting:
                raise ValueError(f"load_into: {name} came twice, or apart from the rest of {group}")
            expected = waiting[group][name]
            if name.endswith(".A_log") and tensor.numel() == expected.numel():
                tensor = tensor.reshape(expected.shape)
            if tensor.shape != expected.shape:
                raise ValueError(
                    f"load_into: {name} has shape {tuple(tensor.shape)}, "
                    f"the model needs {tuple(expected.shape)}"
                )
            received[name] = tensor
        targets = waiting.pop(group)
        if absent := targets.keys() - received.keys():
            raise ValueError(f"load_into: {group} is incomplete: {len(absent)} missing, first {min(absent)}")
        for name, target in targets.items():
            target.copy_(received[name])
    if waiting:
        raise ValueError(f"load_into: {len(waiting)} parts never came, first {next(iter(waiting))}")
