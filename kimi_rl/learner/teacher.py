"""The teacher of a distillation: a plain transformer on packed rows, with a look at every layer's attention."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from transformers import AttentionInterface, KimiLinearConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from kimi_rl.errors import InputError
from kimi_rl.kernels.dispatch import choose
from kimi_rl.kernels.rms_norm import rms_norm
from kimi_rl.kernels.segments import Segments
from kimi_rl.kernels.swiglu import swiglu
from kimi_rl.kernels.varlen_attention import varlen_attention
from kimi_rl.learner.packing import Pack
from kimi_rl.model.source import load_source

# What `Teacher.run` calls for each layer in order: its number, its input and its attention's output, both [1, T, D].
OnAttention = Callable[[int, torch.Tensor, torch.Tensor], None]

Forward = Callable[[torch.Tensor], torch.Tensor]

_PACKED = "kimi_rl_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    segments: Segments,
    sliding_window: int | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface on a packed row: query [1, H, T, K], key and value [1, G, T, .] for G groups of
    heads; returns [1, T, H, V]. `segments` comes through the model's keyword arguments."""
    longest = max(segments.lengths())
    if sliding_window is not None and longest > sliding_window:
        raise InputError(
            f"teacher: its attention looks back {sliding_window} tokens, a text has {longest}; lower max_length"
        )
    heads = query.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    k, v = (_for_every_head(x, heads) for x in (k, v))
    return varlen_attention(q, k, v, segments, scale=scaling).unsqueeze(0), None


def _for_every_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[T, G, K] of groups -> [T, H, K], each group's once for each of its heads."""
    length, groups, width = x.shape
    return x.unsqueeze(2).expand(length, groups, heads // groups, width).reshape(length, heads, width)


def _norm(module: torch.nn.Module, own: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
    if choose("rms_norm", hidden_states, has_fla=True) == "fla":
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)
    return own(hidden_states)


def _feed_forward(module: torch.nn.Module, own: Forward, x: torch.Tensor) -> torch.Tensor:
    if choose("swiglu", x, has_fla=True) == "fla":
        return module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return own(x)


def fuse(model: PreTrainedModel) -> None:
    """On a card, norms and the middle of feed-forward layers in one kernel each, rounded once.

    In bf16 transformers' norm is eight operations, most of them on float32 copies of all states: of the bytes that a
    small teacher moves, more than a third. Elsewhere, and with other kernels forced, they stay transformers' own.
    """
    feed_forward = ("gate_proj", "up_proj", "down_proj") if model.config.hidden_act == "silu" else ()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(_norm, module, module.forward)
        elif feed_forward and all(hasattr(module, name) for name in feed_forward):
            module.forward = functools.partial(_feed_forward, module, module.forward)


AttentionInterface.register(_PACKED, packed_attention)


class Teacher:
    """A frozen causal language model of another family. Texts of a packed row do not see each other in it."""

    def __init__(self, path: str, where: str, *, dtype: torch.dtype, device: str | torch.device):
        self.model = load_source(path, where, dtype=dtype, device=device, attention=_PACKED)
        fuse(self.model)
        self.layers = self.model.base_model.layers

    @property
    def head(self) -> torch.Tensor:
        """[V, D], the output head."""
        return self.model.get_output_embeddings().weight

    @torch.no_grad()
    def run(self, pack: Pack, on_attention: OnAttention | None = None) -> torch.Tensor:
        """The last hidden states [T, D]. Gradients are off, also where `on_attention` runs."""
        hooks = []
        if on_attention is not None:
            inputs: dict[int, torch.Tensor] = {}

            def keep(index: int):
                def hook(layer, args, kwargs):
                    inputs[index] = args[0] if args else kwargs["hidden_states"]

                return hook

            def tell(index: int):
                return lambda attention, args, output: on_attention(index, inputs.pop(index), output[0])

            for index, layer in enumerate(self.layers):
                hooks.append(layer.register_forward_pre_hook(keep(index), with_kwargs=True))
                hooks.append(layer.self_attn.register_forward_hook(tell(index)))
        try:
            out = self.model.base_model(
                input_ids=pack.input_ids, position_ids=pack.positions, segments=pack.segments, use_cache=False
            )
        finally:
            for hook in hooks:
                hook.remove()
        return out.last_hidden_state[0]


def check_pair(teacher: PreTrainedConfig, student: KimiLinearConfig, where: str, *, vocabulary: bool = True) -> None:
    """Raises InputError unless the two fit layer by layer. `where` (the recipe's field) opens the message.

    Without `vocabulary` the sizes of the vocabularies are left out.
    """
    fields = ["num_hidden_layers", "hidden_size", *(["vocab_size"] if vocabulary else [])]
    differing = [
        f"{field} {getattr(teacher, field)}, the student's is {getattr(student, field)}"
        for field in fields
        if getattr(teacher, field) != getattr(student, field)
    ]
    if differing:
        raise InputError(
            f"{where}: the teacher has {'; '.join(differing)}; start from a model that `kimi-rl convert` made of it"
        )
