"""`KimiLinearForCausalLM` for vLLM's CPU platform.

Forward, logits, weight loading and cache specifications are inherited from vLLM's class. Only the
constructors are ours: vLLM's create CUDA streams and pick the GPU layers.
"""

from __future__ import annotations

from torch import nn
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mla import MLAModules, MultiHeadLatentAttentionWrapper
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import make_layers, maybe_prefix
from vllm.models.kimi_k3.nvidia import model as stock

from kimi_rl.rollout.vllm_plugin.kda import CpuKimiDeltaAttention


class KimiMLAAttention(nn.Module):
    """NoPE multi-head latent attention with an uncompressed query projection."""

    def __init__(self, config, vllm_config, prefix: str):
        super().__init__()
        if not config.mla_use_nope or config.q_lora_rank is not None or config.mla_use_output_gate:
            raise NotImplementedError(
                "MLA on a CPU: mla_use_nope true, q_lora_rank null and no output gate only"
            )
        quant = vllm_config.quant_config
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        nope, shared, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim

        def linear(kind, name: str, inputs: int, outputs: int):
            return kind(inputs, outputs, bias=False, quant_config=quant, prefix=f"{prefix}.{name}")

        self.kv_a_proj_with_mqa = linear(ReplicatedLinear, "kv_a_proj_with_mqa", hidden, rank + shared)
        self.q_proj = linear(ColumnParallelLinear, "q_proj", hidden, heads * (nope + shared))
        # Not `rms_norm_eps`: transformers and the published model code leave this norm at 1e-6, its default.
        self.kv_a_layernorm = RMSNorm(rank, eps=1e-6)
        self.kv_b_proj = linear(ColumnParallelLinear, "kv_b_proj", rank, heads * (nope + value))
        self.o_proj = linear(RowParallelLinear, "o_proj", heads * value, hidden)
        modules = MLAModules(
            kv_a_layernorm=self.kv_a_layernorm,
            kv_b_proj=self.kv_b_proj,
            rotary_emb=None,
            o_proj=self.o_proj,
            fused_qkv_a_proj=None,
            kv_a_proj_with_mqa=self.kv_a_proj_with_mqa,
            q_a_layernorm=None,
            q_b_proj=None,
            q_proj=self.q_proj,
            indexer=None,
            is_sparse=False,
            topk_indices_buffer=None,
        )
        self.mla_attn = MultiHeadLatentAttentionWrapper(
            hidden,
            heads,
            (nope + shared) ** -0.5,
            nope,
            shared,
            value,
            None,
            rank,
            modules,
            vllm_config.cache_config,
            quant,
            prefix,
        )

    def forward(self, positions, hidden_states):
        return self.mla_attn(positions, hidden_states)


class KimiDecoderLayer(stock.KimiDecoderLayer):
    def __init__(self, config, vllm_config, prefix: str = ""):
        nn.Module.__init__(self)
        if config.attn_res_block_size is not None:
            raise NotImplementedError("attn_res_block_size is not supported on a CPU")
        self.hidden_size = config.hidden_size
        self.layer_idx = int(prefix.rsplit(".", 1)[1])
        self.use_sequence_parallel = self.use_attn_res = False
        attention = CpuKimiDeltaAttention if config.is_kda_layer(self.layer_idx) else KimiMLAAttention
        self.self_attn = attention(config, vllm_config, prefix=f"{prefix}.self_attn")
        self.is_moe = config.is_moe
        self.is_moe_layer = (
            config.is_moe
            and self.layer_idx >= config.first_k_dense_replace
            and self.layer_idx % config.moe_layer_freq == 0
        )
        if self.is_moe_layer:
            self.block_sparse_moe = stock.KimiMoE(
                config=config,
                vllm_config=vllm_config,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.block_sparse_moe",
                layer_idx=self.layer_idx,
            )
            self.mlp = self.block_sparse_moe
        else:
            self.mlp = stock.KimiMLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.mlp",
            )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class KimiLinearModel(stock.KimiLinearModel):
    def __init__(self, *, vllm_config, prefix: str = ""):
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_text_config
        self.config, self.vocab_size = config, config.vocab_size
        self.attn_res_block_size, self.num_attn_res_blocks = None, 0
        self.use_attn_res = self.use_sequence_parallel = False
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: KimiDecoderLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class KimiLinearForCausalLM(stock.KimiLinearForCausalLM):
    def __init__(self, *, vllm_config, prefix: str = ""):
        nn.Module.__init__(self)
        if get_tensor_model_parallel_world_size() != 1 or get_pp_group().world_size != 1:
            raise NotImplementedError("tensor and pipeline parallelism are not supported on a CPU")
        self.model_config, self.vllm_config = vllm_config.model_config, vllm_config
        self.config, self.quant_config = self.model_config.hf_config, vllm_config.quant_config
        self.model = KimiLinearModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        self.logits_processor = LogitsProcessor(
            self.config.vocab_size, scale=getattr(self.config, "logit_scale", 1.0)
        )
