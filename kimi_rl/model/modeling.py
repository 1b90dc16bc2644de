"""The model: transformers' Kimi Linear with the changes that training needs.

`KimiLinearForCausalLM` has the parameters, names and logits of `transformers.KimiLinearForCausalLM`, and adds

- KDA through `kimi_rl.kernels`, chosen by the tensor's device (transformers calls Triton on CPU tensors when
  fla is installed), with a gate whose gradient has no NaN;
- packed batches: `cu_seqlens` separates sequences in KDA, in the short convolution and in MLA, and `parents` lets
  some go on from the end of another, as the completions of one prompt do. transformers takes packed input and
  lets the state run on from one sequence into the next;
- `scored_tokens`: log-probs and entropies of given tokens, without the logits of any other;
- under autocast the embedding, the norms' weights and the head too are rounded to autocast's dtype, as in the engine
  that serves them (see `as_served`);
- on a card, norms, the gated norm and the middle of the feed-forward layers each in one kernel, rounded once;
- `A_log`, `dt_bias`, the convolution and the router's bias stay in float32 whatever dtype the rest has, as in
  vLLM.

Left padding works everywhere; right padding everywhere except for decoding on from a cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from kimi_rl.kernels.dispatch import choose, compute_dtype
from kimi_rl.kernels.kda_chunk import kda_chunk
from kimi_rl.kernels.kda_chunk.fla_shared import kda_shared_fla, runs_in_one_pass
from kimi_rl.kernels.kda_decode import kda_decode
from kimi_rl.kernels.kda_gate import kda_gate
from kimi_rl.kernels.kda_step import kda_step
from kimi_rl.kernels.logprob import token_logprobs
from kimi_rl.kernels.product import wide_product
from kimi_rl.kernels.rms_norm import rms_norm
from kimi_rl.kernels.segments import Segments
from kimi_rl.kernels.short_conv import short_conv
from kimi_rl.kernels.swiglu import swiglu
from kimi_rl.kernels.varlen_attention import varlen_attention
from kimi_rl.model.projections import projected_apart, projected_together
from kimi_rl.model.stock import hf

# Decoding with a KDA layer's step in one kernel: on a card unless it is 0, elsewhere only if it is 1.
FUSED_DECODE = "KIMI_RL_FUSED_DECODE"

# In place of masks for a packed row. A dictionary is taken as is; the layers separate the sequences themselves.
NO_MASKS = {"full_attention": None, "linear_attention": None}

# Parameters and buffers kept in float32, by the last parts of their names.
KEPT_IN_FP32 = ("A_log", "dt_bias", "conv1d.weight", "e_score_correction_bias")


def fuses_decoding(device: torch.device) -> bool:
    return os.environ.get(FUSED_DECODE, "1" if device.type == "cuda" else "0") == "1"


def served_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that the rollout engine holds weights in while the learner trains as it does now; None: the same."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def as_served(weight: torch.Tensor) -> torch.Tensor:
    """`weight` rounded as the engine holds it.

    Autocast rounds what goes into a matrix product and leaves the rest in float32. The engine rounds all. With random
    weights the embedding alone made the learner's log-probs differ from the engine's by a third more.
    """
    dtype = served_dtype(weight.device.type)
    return weight if dtype is None else weight.to(dtype)


class Embedding(torch.nn.Embedding):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = super().forward(input_ids)
        return as_served(states).to(states.dtype)  # the residual stream stays in float32


class RMSNorm(hf.KimiLinearRMSNorm):
    """transformers' norm with the weight as served; on a card one kernel each way."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = as_served(self.weight)
        if choose("rms_norm", hidden_states, has_fla=True) == "fla":
            dtype = self._dtype_on_card(hidden_states, weight)
            return rms_norm(hidden_states, weight, self.variance_epsilon, out_dtype=dtype)
        states = hidden_states.to(compute_dtype(hidden_states))
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return weight * states.to(hidden_states.dtype)

    def _dtype_on_card(self, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
        return torch.promote_types(hidden_states.dtype, weight.dtype)


class NormBeforeLinear(RMSNorm):
    """A norm whose output only linear layers read: under autocast on a card it comes in the dtype they would cast to.

    Each of them (a KDA layer has six) would otherwise cast it again, and cast its gradient back.
    """

    def _dtype_on_card(self, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
        return served_dtype(hidden_states.device.type) or super()._dtype_on_card(hidden_states, weight)


class RMSNormGated(hf.KimiLinearRMSNormGated):
    """transformers' gated norm with the weight as served; on a card one kernel each way."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, as_served(self.weight), self.variance_epsilon, gate=gate)


class MLP(hf.KimiLinearMLP):
    """transformers' feed-forward layer; on a card its middle is one kernel each way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.config.hidden_act == "silu" and choose("swiglu", gate, has_fla=True) == "fla":
            return self.down_proj(swiglu(gate, up))
        return self.down_proj(self.act_fn(gate) * up)


class DeltaAttention(hf.KimiLinearDeltaAttention):
    """Same parameters as transformers' KDA layer."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params=None,
        attention_mask: torch.Tensor | None = None,
        segments: Segments | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; attention_mask [B, T] with 0 at padding, or None.

        `segments`: the sequences of a packed row (then B is 1).
        """
        hidden_states = hf.apply_mask_to_padding_states(hidden_states, attention_mask)
        batch, length = hidden_states.shape[:2]
        if segments is None and length == 1 and self._decodes_fused(cache_params):
            cached = cache_params.layers[self.layer_idx]
            step = self.step(hidden_states[:, 0], cached.conv_states[0], cached.recurrent_states[0])
            return self.o_proj(step).unsqueeze(1)

        gate = self.forget_gate
        qkv = projected_together(hidden_states, [self.q_proj, self.k_proj, self.v_proj])
        forget, out, beta = projected_apart(hidden_states, [gate.f_a_proj, self.g_a_proj, self.b_proj])
        g = kda_gate(gate.f_b_proj(forget), gate.A_log, gate.dt_bias)  # [B, T, H, K], the log decay, in float32
        beta = beta.to(compute_dtype(beta)).sigmoid()
        if segments is not None:
            o = self._over_segments(qkv, g, beta, segments)
        else:
            o = self._over_rows(qkv, g, beta, cache_params)
        out = self.g_b_proj(out).view(batch, length, self.num_heads, self.head_dim)
        return self.o_proj(self.o_norm(o, out).reshape(batch, length, -1))

    def _convolve(self, qkv: torch.Tensor, **options):
        """q, k, v [B, T, H, .] after the short convolution, and its state."""
        weight = self.conv1d.weight.squeeze(1)
        mixed, state = short_conv(qkv, weight, activation="silu", **options)
        heads = (*qkv.shape[:2], self.num_heads, self.head_dim)
        return *(x.view(heads) for x in mixed.split(self.qkv_dim, dim=-1)), state

    def _over_rows(self, qkv: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, cache_params) -> torch.Tensor:
        """Rows of a batch, from and into a cache if there is one: [B, T, H, V]."""
        continues = cache_params is not None and cache_params.has_previous_state(self.layer_idx)
        conv_state = recurrent_state = None
        if continues:
            layer = cache_params.layers[self.layer_idx]
            # transformers caches W inputs; the convolution looks back at W - 1.
            conv_state = layer.conv_states[0][..., -(self.conv_kernel_size - 1) :]
            recurrent_state = layer.recurrent_states[0]
        q, k, v, _ = self._convolve(qkv, initial_state=conv_state)
        if cache_params is not None:
            cache_params.update_conv_state(
                qkv.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
            )
        if continues and qkv.shape[1] == 1:
            o, state = kda_decode(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], recurrent_state)
            o = o.unsqueeze(1)
        else:
            wanted = cache_params is not None
            o, state = kda_chunk(q, k, v, g, beta, initial_state=recurrent_state, output_final_state=wanted)
        if cache_params is not None:
            cache_params.update_recurrent_state(state, self.layer_idx)
        return o

    def _decodes_fused(self, cache_params) -> bool:
        return (
            cache_params is not None
            and cache_params.has_previous_state(self.layer_idx)
            and fuses_decoding(self.o_proj.weight.device)
            and not torch.is_grad_enabled()
        )

    def step(self, hidden: torch.Tensor, conv_state: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """One token, hidden [B, D]: the input of `o_proj` [B, H*V]. Moves conv_state [B, C, W] and state [B, H, K, V].

        No gradient, and no tensor that the host reads.
        """
        gate = self.forget_gate
        return kda_step(
            self.q_proj(hidden),
            self.k_proj(hidden),
            self.v_proj(hidden),
            gate.f_b_proj(gate.f_a_proj(hidden)),
            self.b_proj(hidden),
            self.g_b_proj(self.g_a_proj(hidden)),
            conv_state,
            state.transpose(-1, -2),
            conv_weight=self.conv1d.weight.squeeze(1),
            A_log=gate.A_log,
            dt_bias=gate.dt_bias,
            norm_weight=as_served(self.o_norm.weight),
            eps=self.o_norm.variance_epsilon,
        )

    def _over_segments(
        self, qkv: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """Sequences of a packed row: [1, T, H, V]. Those that go on from another start from its last state."""

        parents = None if segments.continuing is None else segments
        q, k, v, _ = self._convolve(qkv, cu_seqlens=segments.cu_seqlens, parents=parents)
        if segments.continuing is None:
            return kda_chunk(q, k, v, g, beta, **_borders(segments))[0]
        if runs_in_one_pass(q):
            return kda_shared_fla(q, k, v, g, beta, segments)
        # `split`, for the way back from two slices would fill two rows with zeros and add them.
        sizes = [segments.border, segments.length - segments.border]
        prompts, completions = zip(*(x.split(sizes, dim=1) for x in (q, k, v, g, beta)), strict=True)
        first, states = kda_chunk(*prompts, output_final_state=True, **_borders(segments.starting))
        states = states[segments.parent_of_continuing]
        second, _ = kda_chunk(*completions, initial_state=states, **_borders(segments.continuing))
        return torch.cat([first, second], dim=1)


def _borders(segments: Segments) -> dict[str, torch.Tensor]:
    return {"cu_seqlens": segments.cu_seqlens, "cu_seqlens_cpu": segments.cu_seqlens_cpu}


class LatentAttention(hf.KimiLinearAttention):
    """transformers' MLA layer, and packed rows."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values=None,
        segments: Segments | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if segments is None:
            return super().forward(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        length = hidden_states.shape[1]
        q, latent, shared_key = self._projected(hidden_states)
        q = q.view(length, self.num_heads, self.qk_head_dim)
        k, v = self.expand_kv(latent.unsqueeze(1), shared_key.unsqueeze(1))  # [1, H, T, .]
        dropout = self.attention_dropout if self.training else 0.0
        k, v = k[0].transpose(0, 1), v[0].transpose(0, 1)
        o = varlen_attention(q, k, v, segments, scale=self.scaling, dropout=dropout)
        return self.o_proj(o.reshape(1, length, -1)), None

    def _projected(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., D] -> queries of all heads, the normed latent, and the part of the keys that heads share."""
        if self.q_lora_rank is None:
            q = self.q_proj(hidden_states)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        sizes = [self.kv_lora_rank, self.qk_rope_head_dim]
        latent, shared_key = self.kv_a_proj_with_mqa(hidden_states).split(sizes, dim=-1)
        return q, self.kv_a_layernorm(latent), shared_key

    def step(
        self, hidden: torch.Tensor, latents: torch.Tensor, place: torch.Tensor, hidden_places: torch.Tensor
    ) -> torch.Tensor:
        """One token, hidden [B, D] -> [B, D], which goes to `place` int64 [1] of latents [B, room, R + P].

        Queries and outputs pass through the latents' space, so that keys and values are never made ("absorbed").
        hidden_places float32 [B, 1, room]: 0 where a query may look, -inf elsewhere. No tensor is read by the host.
        """
        q, latent, shared_key = self._projected(hidden)
        latents.index_copy_(1, place, torch.cat([latent, shared_key], dim=-1).unsqueeze(1).to(latents.dtype))
        dtype = latents.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            up = self.kv_b_proj.weight.to(dtype).view(self.num_heads, -1, self.kv_lora_rank)
            to_keys, to_values = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
            q_nope, q_shared = (
                q.to(dtype).view(-1, self.num_heads, self.qk_head_dim).split(
                    [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1
                )
            )  # fmt: skip
            q = torch.cat([torch.bmm(q_nope.transpose(0, 1), to_keys).transpose(0, 1), q_shared], dim=-1)
            scores = wide_product(q, latents.transpose(1, 2), compute_dtype(q)) * self.scaling + hidden_places
            weights = scores.softmax(-1).to(dtype)
            mixed = torch.bmm(weights, latents[..., : self.kv_lora_rank])  # [B, H, R]
            o = torch.bmm(mixed.transpose(0, 1), to_values.transpose(1, 2)).transpose(0, 1)
        return self.o_proj(o.reshape(len(hidden), -1))


_REPLACEMENTS = {
    torch.nn.Embedding: Embedding,
    hf.KimiLinearRMSNorm: RMSNorm,
    hf.KimiLinearRMSNormGated: RMSNormGated,
    hf.KimiLinearDeltaAttention: DeltaAttention,
    hf.KimiLinearAttention: LatentAttention,
    hf.KimiLinearMLP: MLP,
}


def _before_linear(model: hf.KimiLinearForCausalLM):
    """The norms whose output only linear layers read: not the last, nor those in front of a router."""
    for layer in model.model.layers:
        attention = layer.self_attn
        norms = [layer.input_layernorm, getattr(attention, "q_a_layernorm", None)]
        norms.append(getattr(attention, "kv_a_layernorm", None))
        if isinstance(layer.mlp, hf.KimiLinearMLP):
            norms.append(layer.post_attention_layernorm)
        yield from (norm for norm in norms if norm is not None)


@dataclass
class ScoredTokens(ModelOutput):
    """Log-probs of the scored tokens [S], and the entropies of the distributions they come from [S] or None."""

    logps: torch.Tensor | None = None
    entropies: torch.Tensor | None = None


class KimiLinearForCausalLM(hf.KimiLinearForCausalLM):
    """Kimi Linear for causal language modelling. The top of this file says what differs."""

    # Honoured by `from_pretrained(dtype=torch.bfloat16)`; `_apply` below does the same for `model.to(dtype)`.
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias", "conv1d", "e_score_correction_bias"}

    def __init__(self, config):
        super().__init__(config)
        for module in self.modules():
            # The subclasses add no parameter and no attribute, only another `forward`.
            module.__class__ = _REPLACEMENTS.get(type(module), type(module))
        for norm in _before_linear(self):
            norm.__class__ = NormBeforeLinear

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
        parents: torch.Tensor | None = None,
        segments: Segments | None = None,
        scored_places: torch.Tensor | None = None,
        scored_tokens: torch.Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = True,
        **kwargs,
    ):
        """As transformers' forward, plus packed input and scores of given tokens.

        `cu_seqlens` int [N+1] gives the borders of N sequences packed into a batch of one, from 0 to T.
        transformers' padding-free collators spell it `cu_seq_lens_q`; what else they pass is not needed. With
        `labels`, put -100 on the first token of every sequence: the loss shifts across borders. `parents` int [N]
        names for each sequence the one it goes on from, or -1 (see `kernels/segments.py`). `segments` says both at
        once, without a read from the device.
        `scored_tokens` int [S] asks for `ScoredTokens` in place of logits: the log-probs that the states at
        `scored_places` int [S], places in the packed row, give them at `temperature`.
        A cache is created by default only when no gradient is recorded: training has no use for one.
        """
        cu_seqlens = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
        if cu_seqlens is not None and segments is None:
            parents = None if parents is None else parents.tolist()
            segments = Segments(cu_seqlens.tolist(), parents, device=input_ids.device)
        if segments is not None:
            if past_key_values is not None or use_cache:
                raise ValueError(
                    "packed input (cu_seqlens) cannot be combined with a cache; pass use_cache=False"
                )
            if attention_mask is not None:
                raise ValueError("packed input (cu_seqlens) has no padding; pass no attention_mask")
            if input_ids.shape != (1, segments.length):
                raise ValueError(
                    f"cu_seqlens must run from 0 to the packed length {input_ids.shape[1]} of one row, found "
                    f"0..{segments.length} for input_ids {list(input_ids.shape)}"
                )
            attention_mask = NO_MASKS
            use_cache = False
            kwargs["segments"] = segments
        elif position_ids is not None and attention_mask is None and _restarts(position_ids):
            raise ValueError("position_ids restart inside a row: pass cu_seqlens, or the sequences would mix")
        if use_cache is None and past_key_values is None and torch.is_grad_enabled():
            use_cache = False
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        if scored_tokens is None:
            return super().forward(**inputs)
        hidden = self.model(**inputs).last_hidden_state[0, scored_places]
        logps, entropies = token_logprobs(
            hidden,
            self.lm_head.weight,
            scored_tokens,
            temperature=temperature,
            with_entropy=with_entropy,
            matmul_dtype=served_dtype(hidden.device.type),
        )
        return ScoredTokens(logps=logps, entropies=entropies)

    def _apply(self, fn: Callable, recurse: bool = True):
        """`model.to(dtype)`, `.bfloat16()`, ...: keep float32 what must stay float32."""
        kept = {name: tensor.data for name, tensor in fp32_tensors(self)}
        super()._apply(fn, recurse)
        for name, tensor in fp32_tensors(self):
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = kept[name].to(device=tensor.device, dtype=torch.float32)
        return self


def _restarts(position_ids: torch.Tensor) -> bool:
    return position_ids.shape[-1] > 1 and bool((position_ids.diff(dim=-1) < 0).any())


def fp32_tensors(model: torch.nn.Module):
    """(name, tensor) of every parameter and buffer that stays in float32."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(KEPT_IN_FP32):
            yield name, tensor
