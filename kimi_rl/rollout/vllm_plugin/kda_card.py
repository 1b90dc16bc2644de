"""vLLM's KDA layer on a card, with steps of decoding alone in one kernel (`kernels/kda_step`).

vLLM 0.26 launches nine kernels between a layer's projections and `o_proj` for one new token per sequence: three short
convolutions, gate, beta, delta rule, gated norm, zeros and copies. Here they are one, which reads and writes the states
where vLLM keeps them, so a step of either kind can follow a step of the other. Projections, caches, metadata and steps
with a prompt in them are vLLM's.

`KIMI_RL_VLLM_KDA_STEP=1` switches it on, for engines that start after. Off unless asked for: it saves the card a
tenth of a step, and engines of small models wait for their host (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn import KimiGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from kimi_rl.kernels.kda_step import kda_step
from kimi_rl.rollout.vllm_plugin import KDA_STEP


class CardKimiDeltaAttention(KimiGatedDeltaNetAttention):
    """vLLM's layer, called through vLLM's own custom op, at which vLLM cuts its graphs.

    The op has no argument for the output gate. It comes in the tensor that the op fills: raw gates go in, and what
    `o_proj` takes, normed and gated, comes out in their place.
    """

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor, output: torch.Tensor) -> None:
        q = self.q_proj(hidden_states)[0]
        k = self.k_proj(hidden_states)[0]
        v = self.v_proj(hidden_states)[0]
        beta = self.b_proj(hidden_states)[0]
        forget = self.f_b_proj(self.f_a_proj(hidden_states)[0])[0]
        gated = self.g_b_proj(self.g_a_proj(hidden_states)[0])[0]
        torch.ops.vllm.kda_attention(q, k, v, forget, beta, gated, self.prefix)
        output[:] = self.o_proj(gated)[0]

    def _forward(
        self,
        q_proj_states: torch.Tensor,
        k_proj_states: torch.Tensor,
        v_proj_states: torch.Tensor,
        g1: torch.Tensor,
        beta: torch.Tensor,
        core_attn_out: torch.Tensor,
    ) -> None:
        """q, k, v [T, H*D] before the convolution, g1 [T, H*D] and beta [T, H] raw; core_attn_out [T, H*D] as above.

        T may be padded beyond the step's tokens. The host reads no tensor.
        """
        if core_attn_out.ndim != 2:
            raise RuntimeError(f"{KDA_STEP}: this graph was compiled for vLLM's own KDA layer; clear vLLM's cache")
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # a profiling run
            core_attn_out.zero_()
            return
        metadata = metadata[self.prefix]
        inputs = (q_proj_states, k_proj_states, v_proj_states, g1, beta, core_attn_out)
        if self._is_one_step(metadata):
            self._step(*inputs, metadata)
        else:
            self._as_vllm_does(*inputs)

    def _is_one_step(self, metadata: Any) -> bool:
        """Whether each row is the next token of a sequence of its own, with states as `kda_step` knows them."""
        slots = metadata.non_spec_state_indices_tensor
        if metadata.num_prefills or metadata.num_spec_decodes or slots is None:
            return False
        conv_state, state = self._states()
        return (
            len(slots) >= metadata.num_actual_tokens
            and state.dtype == torch.float32
            and conv_state.shape[-1] == self.conv_size - 1
            and self.q_conv1d.bias is None
            and getattr(self, "gate_lower_bound", None) is None
        )

    def _step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        forget: torch.Tensor,
        beta: torch.Tensor,
        gated: torch.Tensor,
        metadata: Any,
    ) -> None:
        """A graph of whole steps counts its padding among the tokens: rows of vLLM's null block, which are skipped."""
        tokens = metadata.num_actual_tokens
        kda_step(
            *(x[:tokens] for x in (q, k, v, forget, beta, gated)),
            *self._states(),
            conv_weight=tuple(conv.weight.squeeze(1) for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            norm_weight=self.o_norm.weight,
            eps=self.o_norm.eps,
            slots=metadata.non_spec_state_indices_tensor[:tokens],
            first_slot=NULL_BLOCK_ID + 1,
            out=gated[:tokens],
        )
        if tokens < len(gated):  # the padding of graphs that are cut here
            gated[tokens:].zero_()

    def _as_vllm_does(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        forget: torch.Tensor,
        beta: torch.Tensor,
        gated: torch.Tensor,
    ) -> None:
        """What vLLM's `forward` does about its op."""
        heads = (self.local_num_heads, self.head_dim)
        out = gated.new_zeros(1, len(gated), *heads)
        super()._forward(
            q_proj_states=q,
            k_proj_states=k,
            v_proj_states=v,
            g1=forget.unflatten(-1, heads).unsqueeze(0),
            beta=beta.float().sigmoid().unsqueeze(0),
            core_attn_out=out,
        )
        # `forward_cuda`: no compiler makes one kernel of the norm here, as it does in vLLM's layer.
        gated.copy_(self.o_norm.forward_cuda(out, gated.unflatten(-1, heads)).view(gated.shape))

    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's caches: the last W-1 inputs of all channels [slots, 3P, W-1] and the states [slots, H, V, K]."""
        conv_state, state = self.kv_cache
        return (conv_state if is_conv_state_dim_first() else conv_state.transpose(-1, -2)), state
