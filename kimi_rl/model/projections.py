"""Linear layers that read the same input, in one matrix product.

A KDA layer reads its input six times: q, k, v, beta, and the first halves of its gates. One product of the weights put
end to end gives what the convolution takes without joining activations, and its way back is one gradient of the input.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

# On a card unless it is 0, elsewhere only if it is 1.
JOINT_PROJECTIONS = "KIMI_RL_JOINT_PROJECTIONS"


def projected_together(x: torch.Tensor, layers: Sequence[torch.nn.Linear]) -> torch.Tensor:
    """x [..., D] through each layer, end to end: [..., sum of their widths].

    One product where the switch allows it and all are plain layers without bias: an adapter or a hook on one of them
    must still see its input. The same to rounding as one after another.
    """
    return _product(x, layers) if _joins(x, layers) else torch.cat([layer(x) for layer in layers], dim=-1)


def projected_apart(x: torch.Tensor, layers: Sequence[torch.nn.Linear]) -> tuple[torch.Tensor, ...]:
    """The same, a tensor for each layer; in one product they are slices of one."""
    if _joins(x, layers):
        return _product(x, layers).split([layer.out_features for layer in layers], dim=-1)
    return tuple(layer(x) for layer in layers)


def _product(x: torch.Tensor, layers: Sequence[torch.nn.Linear]) -> torch.Tensor:
    return torch.nn.functional.linear(x, torch.cat([layer.weight for layer in layers]))


def _joins(x: torch.Tensor, layers: Sequence[torch.nn.Module]) -> bool:
    wanted = os.environ.get(JOINT_PROJECTIONS, "1" if x.is_cuda else "0") == "1"
    return wanted and all(_plain(layer) for layer in layers)


def _plain(layer: torch.nn.Module) -> bool:
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is torch.nn.Linear and layer.bias is None and not hooks
