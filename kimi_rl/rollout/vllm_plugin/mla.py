"""MLA on a CPU for any head size: vLLM's backend with decoding and the cache write in PyTorch.

vLLM's CPU backend takes latent sizes of 576 and blocks of 16 tokens only, and shares a cache with KDA
states badly (their pages are larger). Prefill stays vLLM's: scaled dot product attention in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonMetadataBuilder
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl


@dataclass
class TorchMLAMetadata(MLACommonMetadata):
    def __post_init__(self):
        """vLLM admits a few head sizes here; this backend takes any."""


class TorchMLAMetadataBuilder(MLACommonMetadataBuilder):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, metadata_cls=None, **kwargs):
        super().__init__(
            kv_cache_spec,
            layer_names,
            vllm_config,
            device,
            metadata_cls=metadata_cls or TorchMLAMetadata,
            **kwargs,
        )


class TorchMLABackend(CPUMLABackend):
    @staticmethod
    def get_builder_cls():
        return TorchMLAMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(16)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or block_size % 16 == 0

    @staticmethod
    def get_impl_cls():
        return TorchMLAImpl


class TorchMLAImpl(CPUMLAImpl):
    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        """Decode: every query attends its request's latents.

        q [B, H, R + P] (or the pair of its parts), with R the latent rank and P the size of the shared key
        part; cache [blocks, block size, R + P]. Returns [B, H, R] and no log-sum-exp.
        """
        if isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        lengths = attn_metadata.decode.seq_lens.long()
        longest = int(lengths.max())
        block_size = kv_c_and_k_pe_cache.shape[1]
        blocks = attn_metadata.decode.block_table[:, : -(-longest // block_size)].long()
        latents = kv_c_and_k_pe_cache[blocks].flatten(1, 2)[:, :longest].float()  # [B, L, R + P]
        beyond = torch.arange(longest, device=q.device) >= lengths.unsqueeze(-1)  # [B, L]
        latents = latents.masked_fill(beyond.unsqueeze(-1), 0.0)  # unused rows may hold anything, NaN too
        scores = (q.float() @ latents.transpose(1, 2)) * self.scale
        weights = scores.masked_fill(beyond.unsqueeze(1), float("-inf")).softmax(-1)
        return (weights @ latents[..., : self.kv_lora_rank]).to(q.dtype), None

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale):
        """Write latents [T, R] and key parts [T, 1, P] into their slots; negative slots are padding."""
        if kv_cache.numel() == 0:  # a profiling run
            return
        slots = slot_mapping.flatten().long()
        tokens = len(slots)
        rows = torch.cat([kv_c_normed[:tokens], k_pe[:tokens].flatten(1)], dim=-1).to(kv_cache.dtype)
        used = slots >= 0
        slots, rows = slots[used], rows[used]
        # By (block, offset): a cache shared with KDA states has gaps between blocks, so it has no flat view.
        kv_cache[slots // kv_cache.shape[1], slots % kv_cache.shape[1]] = rows
