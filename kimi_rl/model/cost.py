"""What a model costs by its configuration alone: FLOPs per token, and the memory a sequence holds while it decodes."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import KimiLinearConfig

from kimi_rl.model.presets import describe

KDA_CHUNK = 64


@dataclass(frozen=True)
class SequenceBytes:
    """Bytes that decoding one sequence keeps: `kv` grows with its length, `state` and `conv` do not."""

    kv: int
    state: int
    conv: int

    @property
    def total(self) -> int:
        return self.kv + self.state + self.conv


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of the forward pass per token (a multiply-add is two): `weights` in projections, feed-forward layers and
    head; `mixing` in attention and recurrence, averaged over the sequence."""

    weights: float
    mixing: float

    @property
    def forward(self) -> float:
        return self.weights + self.mixing

    @property
    def training(self) -> float:
        """Forward and backward: three times the forward."""
        return 3 * self.forward


def sequence_bytes(config: KimiLinearConfig, length: int, cache_bytes: int = 2) -> SequenceBytes:
    """Memory of one sequence of `length` tokens, as vLLM keeps it; `cache_bytes` is 2 for bfloat16, 4 for float32.

    An MLA layer keeps one latent of kv_lora_rank + qk_rope_head_dim values a token. A KDA layer keeps its state
    [H, K, V] in float32 and the last W - 1 inputs of the convolutions of q, k and v [W - 1, 3 H K].
    """
    mla = config.layer_types.count("full_attention")
    kda = config.layer_types.count("linear_attention")
    width = config.linear_num_heads * config.linear_head_dim
    return SequenceBytes(
        kv=mla * length * (config.kv_lora_rank + config.qk_rope_head_dim) * cache_bytes,
        state=kda * width * config.linear_head_dim * 4,
        conv=kda * (config.linear_conv_kernel_dim - 1) * 3 * width * cache_bytes,
    )


def token_flops(config: KimiLinearConfig, length: int) -> TokenFlops:
    """FLOPs per token of a forward pass over a sequence of `length` tokens.

    Weights: 2 per parameter that one token uses, without the input embedding. Mixing: the per-head counts of the Kimi
    Linear report (arXiv 2510.26692), which are for T tokens and heads of size d: KDA in chunks of C = 64,
    6 T d^2 + 3 T C d + T C^2; full causal attention 2 T^2 d, here T^2 (d_qk + d_v) for the two sizes of MLA.
    """
    counts = describe(config)
    used = counts["active"] - config.vocab_size * config.hidden_size
    d, chunk = config.linear_head_dim, KDA_CHUNK
    kda = config.linear_num_heads * (6 * d**2 + 3 * chunk * d + chunk**2)
    mla = config.num_attention_heads * length * (config.qk_head_dim + config.v_head_dim)
    return TokenFlops(
        weights=2.0 * used,
        mixing=float(
            config.layer_types.count("linear_attention") * kda + config.layer_types.count("full_attention") * mla
        ),
    )
