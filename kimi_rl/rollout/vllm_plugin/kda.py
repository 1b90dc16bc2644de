"""The KDA layer on a CPU: vLLM's parameters, projections and state cache; our kernels for the recurrence."""

from __future__ import annotations

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn import KimiGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

from kimi_rl.kernels.kda_chunk import kda_chunk
from kimi_rl.kernels.kda_decode import kda_decode
from kimi_rl.kernels.kda_gate import kda_gate
from kimi_rl.kernels.short_conv import short_conv


class CpuKimiDeltaAttention(KimiGatedDeltaNetAttention):
    """vLLM's shared KDA layer with the state update replaced.

    A step may hold decoding requests (one new token each, always first) and prefilling ones. The former go
    through `kda_decode`, the latter, packed, through `kda_chunk`, so a token's arithmetic does not depend
    on what else is in the batch (vLLM's GPU layer sends all of them through the chunk kernel as soon as one
    request prefills).
    """

    def __init__(self, config, vllm_config, prefix: str = "") -> None:
        super().__init__(config, vllm_config, prefix)
        if self.gate_lower_bound is not None:
            raise NotImplementedError("linear_attn_config.gate_lower_bound is not supported on a CPU")
        self.o_norm.eps = config.rms_norm_eps

    def _forward(
        self,
        mixed_qkv: torch.Tensor,
        g1: torch.Tensor,
        g2: torch.Tensor,
        beta: torch.Tensor,
        core_attn_out: torch.Tensor,
    ) -> None:
        """Fill `core_attn_out` [1, T, H, D].

        mixed_qkv [T, 3*H*D] before the convolution; g1 [1, T, H, D] raw forget gate; g2 [T, H, D] raw
        output gate; beta [1, T, H] before the sigmoid. T may be padded beyond the step's tokens.
        """
        core_attn_out.zero_()
        metadata = get_forward_context().attn_metadata
        metadata = metadata.get(self.prefix) if metadata is not None else None
        if metadata is None:  # a profiling run
            return
        if metadata.spec_sequence_masks is not None:
            raise NotImplementedError("speculative decoding is not supported with KDA on a CPU")
        decodes, prefills, tokens = metadata.num_decodes, metadata.num_prefills, metadata.num_actual_tokens
        slots = metadata.non_spec_state_indices_tensor[: decodes + prefills].long()
        g = kda_gate(g1[0, :tokens].flatten(1), self.A_log, self.dt_bias)
        beta = beta[0, :tokens].float().sigmoid()
        out = core_attn_out[0]
        if decodes:
            now = slice(0, decodes)
            out[now] = self._decode(mixed_qkv[now], g[now], beta[now], slots[now])
        if prefills:
            now = slice(decodes, tokens)
            bounds = metadata.non_spec_query_start_loc[decodes : decodes + prefills + 1] - decodes
            resumed = metadata.has_initial_state[decodes : decodes + prefills]
            out[now] = self._prefill(mixed_qkv[now], g[now], beta[now], slots[decodes:], bounds, resumed)
        core_attn_out.copy_(self.o_norm(core_attn_out, g2))

    def _decode(
        self, x: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """One token each: x [B, 3P], g [B, H, D], beta [B, H], slots [B] -> [B, H, D]."""
        conv_state, state = self._states()
        y, window = short_conv(
            x.unsqueeze(1), self._taps(), initial_state=conv_state[slots], output_final_state=True
        )
        conv_state[slots] = window.to(conv_state.dtype)
        q, k, v = self._heads(y.squeeze(1))
        o, new_state = kda_decode(q, k, v, g, beta, state[slots].transpose(-1, -2))
        state[slots] = new_state.transpose(-1, -2).to(state.dtype)
        return o

    def _prefill(
        self,
        x: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        slots: torch.Tensor,
        bounds: torch.Tensor,
        resumed: torch.Tensor,
    ) -> torch.Tensor:
        """N packed sequences: x [T, 3P], g [T, H, D], beta [T, H], bounds [N+1], slots, resumed [N].

        Returns [T, H, D]. `resumed` is False where a sequence starts here: its slot still holds the state of
        another request.
        """
        conv_state, state = self._states()
        y, window = short_conv(
            x.unsqueeze(0),
            self._taps(),
            initial_state=_keep(conv_state[slots], resumed),
            output_final_state=True,
            cu_seqlens=bounds,
        )
        conv_state[slots] = window.to(conv_state.dtype)
        q, k, v = self._heads(y)
        o, new_state = kda_chunk(
            q,
            k,
            v,
            g.unsqueeze(0),
            beta.unsqueeze(0),
            initial_state=_keep(state[slots], resumed).transpose(-1, -2),
            output_final_state=True,
            cu_seqlens=bounds,
        )
        state[slots] = new_state.transpose(-1, -2).to(state.dtype)
        return o.squeeze(0)

    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's caches: convolution window [slots, 3P, W-1] and recurrent state [slots, H, V, K]."""
        conv_state, state = self.kv_cache
        return (conv_state if is_conv_state_dim_first() else conv_state.transpose(-1, -2)), state

    def _taps(self) -> torch.Tensor:
        return self.conv1d.weight.squeeze(1)  # [3P, W]

    def _heads(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., 3P] -> q, k, v of [..., H, D]."""
        return tuple(part.unflatten(-1, (self.local_num_heads, self.head_dim)) for part in y.chunk(3, dim=-1))


def _keep(state: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`state` [N, ...] with the rows where `mask` [N] is False set to zero, whatever they hold."""
    return state.masked_fill(~mask.view(-1, *[1] * (state.ndim - 1)), 0.0)
