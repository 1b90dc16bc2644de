"""The walk through a source's layers: each attention becomes a KDA or an MLA layer, everything else is copied."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import KimiLinearConfig, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from kimi_rl.chat_marks import mark_chat_template
from kimi_rl.convert import kda, mla
from kimi_rl.convert.attention import SourceAttention, read_attention, watch_heads
from kimi_rl.convert.calibration import calibration_texts, fit_constant, fit_output, head_scales, read_calibration
from kimi_rl.convert.report import write_report
from kimi_rl.errors import InputError
from kimi_rl.kernels.logprob import token_logprobs
from kimi_rl.kernels.relative_error import relative_error
from kimi_rl.kernels.segments import Segments
from kimi_rl.learner.packing import Pack, packed_states
from kimi_rl.learner.teacher import Teacher
from kimi_rl.model.load_save import save_model
from kimi_rl.model.modeling import KimiLinearForCausalLM
from kimi_rl.model.presets import dense_config, hybrid_pattern
from kimi_rl.model.source import load_source_tokenizer, read_source_config

RELEASED_RANK, SHARED_KEY = 512, 64  # the latent of the released model, 512 + 64: vLLM's GPU kernels know this size
# Channels of a head's keys (before the shared 64) -> of its values: the only pairs that vLLM's MLA prefill takes on a
# Hopper card (FlashAttnPrefillBackend of vLLM 0.26). Other sizes keep the source's: that vLLM runs them on a CPU alone.
VALUE_CHANNELS = {64: 128, 128: 128, 192: 256}
CONV_SIZE = 4
HELD_SHARE = 4  # one text in so many is kept from every fit, for the reported errors
START_TOKENS = 2560  # tokens on which the starts of a KDA layer are compared

Progress = Callable[[int, int], None]


def convert(
    path: str,
    out: Path,
    *,
    arch: str = "hybrid",
    ratio: str | None = None,
    rank: int | None = None,
    calibration: str | None = None,
    tokens: int = 8192,
    seed: int = 0,
    command: str = "",
    progress: Progress = lambda done, of: None,
) -> dict[str, Any]:
    """Convert the model at `path` (see `kimi_rl.model.source`) and write the folder `out`.

    Args:
        arch: `hybrid` (KDA and MLA, `ratio` to one) or `mla`.
        rank: kv_lora_rank; None: 512, or the model's width where that is smaller.
        calibration: see `read_calibration`; `tokens` of it are read, a quarter of them only to measure.
        seed: of the weights that start at random (they act on zeros), and of the built-in texts.
        command: what the user typed, for the record.

    Returns:
        What `convert.json` in the folder holds.

    Raises:
        InputError: bad arguments, or a source without a Kimi Linear counterpart; before any model loads.
    """
    kda_per_mla = parse_ratio(arch, ratio)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} exists and is not an empty folder; name a new one")
    source_config = read_source_config(path, "SOURCE")
    check_source(source_config)
    rank = choose_rank(source_config, rank)
    data = read_calibration(calibration)
    tokenizer = load_source_tokenizer(path, "SOURCE")
    marked = mark_chat_template(tokenizer)
    texts = calibration_texts(tokenizer, data, tokens, seed)

    teacher = Teacher(path, "SOURCE", dtype=torch.float32, device="cpu")
    config = target_config(teacher.model.config, tokenizer, kda_per_mla, rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KimiLinearForCausalLM(config).eval().requires_grad_(False)
    copy_rest(teacher, model)
    pack = texts.pack(range(len(texts.ids)))
    held_from = pack.segments.bounds[len(texts.ids) - max(1, len(texts.ids) // HELD_SHARE)]
    layers = []

    def on_attention(index: int, hidden: torch.Tensor, wanted: torch.Tensor) -> None:
        x = teacher.layers[index].input_layernorm(hidden)[0]
        source = read_attention(teacher.model, index)
        mixer = Mixer(source, model.model.layers[index].self_attn, x, wanted[0], pack.segments, held_from)
        kind = "kda" if config.layer_types[index] == "linear_attention" else "mla"
        found = mixer.to_kda() if kind == "kda" else mixer.to_mla()
        layers.append({"layer": index, "kind": kind, **found})
        progress(index + 1, config.num_hidden_layers)

    states = teacher.run(pack, on_attention)
    report = {
        "source": path,
        "command": command,
        "arch": arch,
        "ratio": ratio or ("3:1" if arch == "hybrid" else None),
        "kv_lora_rank": rank,
        "calibration": calibration or "built-in procedural problems",
        "calibration_tokens": {"fitted": held_from, "measured": pack.segments.length - held_from},
        "seed": seed,
        "parameters": {"source": count(teacher.model), "converted": count(model)},
        "chat_template_marked": marked,
        "perplexity": {
            "source": perplexity(states, teacher.head, pack, held_from),
            "converted": perplexity(packed_states(model, pack), model.lm_head.weight, pack, held_from),
        },
        "layers": layers,
    }
    set_generation(model, teacher.model.generation_config, tokenizer)
    save_model(model, tokenizer, out)
    return write_report(out, report)


def parse_ratio(arch: str, ratio: str | None) -> int:
    """KDA layers for each MLA layer; 0 with `arch` mla."""
    if arch not in ("hybrid", "mla"):
        raise InputError(f"--arch: found {arch!r}; use hybrid or mla")
    if arch == "mla":
        if ratio is not None:
            raise InputError(f"--ratio: found {ratio!r} with --arch mla, which has no KDA layers; leave it out")
        return 0
    found = re.fullmatch(r"([1-9]\d*):1", ratio or "3:1")
    if not found:
        raise InputError(f"--ratio: found {ratio!r}; give KDA layers to one MLA layer, such as 3:1")
    return int(found.group(1))


def check_source(config: PreTrainedConfig) -> None:
    """Raises InputError where the parts that are copied have no counterpart."""
    if config.hidden_act != "silu":
        raise InputError(f"SOURCE: its feed-forward layers use {config.hidden_act!r}; Kimi Linear has silu only")
    if getattr(config, "mlp_bias", False):
        raise InputError("SOURCE: its feed-forward layers have biases, which Kimi Linear has not; choose another")
    kinds = getattr(config, "layer_types", None) or []
    if "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None)):
        raise InputError("SOURCE: it has sliding-window attention, which is not converted; choose another")


def choose_rank(config: PreTrainedConfig, rank: int | None) -> int:
    """The size of the latent: at most the model's width, since more could hold nothing more."""
    if rank is None:
        return min(RELEASED_RANK, config.hidden_size)
    if not 1 <= rank <= config.hidden_size:
        raise InputError(f"--kv-lora-rank: found {rank}; use 1 to the model's width, {config.hidden_size}")
    return rank


def target_config(
    source: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, kda_per_mla: int, rank: int
) -> KimiLinearConfig:
    """Kimi Linear of the source's sizes. The head is not tied to the embedding: neither vLLM nor the published code
    knows a tied one, so a tied source's becomes a copy."""
    layers, heads = source.num_hidden_layers, source.num_attention_heads
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // heads
    pattern = hybrid_pattern(layers, kda_per_mla) if kda_per_mla else ["full_attention"] * layers
    fields = {
        "vocab_size": source.vocab_size,
        "hidden_size": source.hidden_size,
        "intermediate_size": source.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": source.max_position_embeddings,
        "initializer_range": source.initializer_range,
        "rms_norm_eps": float(f"{source.rms_norm_eps:.6g}"),  # GGUF files hold it in float32
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        "linear_num_heads": heads,
        "linear_head_dim": head_dim,
        "linear_conv_kernel_dim": CONV_SIZE,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": head_dim,
        "qk_rope_head_dim": SHARED_KEY,
        "v_head_dim": VALUE_CHANNELS.get(head_dim, head_dim),
    }
    return dense_config(fields, pattern)


@torch.no_grad()
def copy_rest(teacher: Teacher, model: KimiLinearForCausalLM) -> None:
    """Embedding, head, norms and feed-forward layers, bit for bit."""
    base = teacher.model.base_model
    model.model.embed_tokens.weight.copy_(base.embed_tokens.weight)
    model.model.norm.weight.copy_(base.norm.weight)
    model.lm_head.weight.copy_(teacher.head)
    for ours, theirs in zip(model.model.layers, teacher.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
            getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())


class Mixer:
    """One layer's attention on its way: fitted on the tokens before `held_from`, measured on the others."""

    def __init__(
        self,
        source: SourceAttention,
        module: torch.nn.Module,
        x: torch.Tensor,
        wanted: torch.Tensor,
        segments: Segments,
        held_from: int,
    ):
        self.source, self.module, self.x, self.wanted = source, module, x, wanted
        self.segments, self.held_from = segments, held_from
        self.constant = fit_constant(x[:held_from])

    def to_kda(self) -> dict[str, Any]:
        self._load(kda.kda_tensors(self.source, self.constant, CONV_SIZE))
        start = min(kda.STARTS, key=self._try)
        self._load(kda.start_tensors(self.source, self.constant, start))
        return {**self._refit(scale_heads=True), "start": asdict(start)}

    def to_mla(self) -> dict[str, Any]:
        source, module, x = self.source, self.module, self.x[: self.held_from]
        bounds = [bound for bound in self.segments.bounds if bound <= self.held_from]
        looks = watch_heads(source, x, bounds)
        query, key, value = mla.absorb(source, x, self.constant)
        factors = mla.factorise(source, key, value, x, looks, module.kv_lora_rank)
        size, spread = mla.latent_size(x, factors.down)
        query = mla.turn_queries(query, looks.turn)
        self._load(mla.mla_tensors(source, query, factors, size, module.state_dict(), module.qk_rope_head_dim))
        return {**self._refit(scale_heads=False), "rank_lost": factors.lost, "latent_size_spread": spread}

    @torch.no_grad()
    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        state = self.module.state_dict()
        for name, tensor in tensors.items():
            state[name].copy_(tensor)

    def _features(self, segments: Segments) -> torch.Tensor:
        """What the output projection reads, [T, H V], on the first texts of the row."""
        found = {}
        hook = self.module.o_proj.register_forward_pre_hook(lambda module, args: found.update(f=args[0][0]))
        try:
            self.module(self.x[None, : segments.length], attention_mask=None, segments=segments)
        finally:
            hook.remove()
        return found["f"]

    def _fitted(self, features: torch.Tensor, upto: int, scale_heads: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Output projection before and after its refit, [d, F] float64, by the tokens up to `upto`."""
        f = features[:upto].double()
        out = self.module.o_proj.weight.double().view(len(self.source.out), self.source.heads, -1)  # as it was loaded
        gram, cross = f.T @ f, f.T @ self.wanted[:upto].double()
        if scale_heads:
            out = out * head_scales(gram, cross, out)[:, None]
        copied = out.flatten(1)
        return copied, fit_output(gram, cross, copied, upto)

    def _try(self, start: kda.KdaStart) -> float:
        """Error of a start after its refit, on texts of the fitted part that this fit has not seen."""
        bounds = [bound for bound in self.segments.bounds if bound <= min(START_TOKENS, self.held_from)]
        self._load(kda.start_tensors(self.source, self.constant, start))
        features = self._features(Segments(bounds))
        upto = bounds[max(1, (len(bounds) - 1) * 3 // 4)]
        fitted = self._fitted(features, upto, scale_heads=True)[1]
        return self._error(features[upto:], fitted, self.wanted[upto : len(features)])

    @staticmethod
    def _error(features: torch.Tensor, out: torch.Tensor, wanted: torch.Tensor) -> float:
        return float(relative_error(features @ out.T.float(), wanted))

    def _refit(self, *, scale_heads: bool) -> dict[str, float]:
        features = self._features(self.segments)
        copied, fitted = self._fitted(features, self.held_from, scale_heads)
        self._load({"o_proj.weight": fitted})
        held, wanted = features[self.held_from :], self.wanted[self.held_from :]
        return {"error_copied": self._error(held, copied, wanted), "error": self._error(held, fitted, wanted)}


def perplexity(states: torch.Tensor, head: torch.Tensor, pack: Pack, held_from: int) -> float:
    """Of the tokens of the measured texts."""
    held = pack.scored_places >= held_from
    places, tokens = pack.scored_places[held], pack.scored_tokens[held]
    logps, _ = token_logprobs(states[places], head, tokens, with_entropy=False)
    return math.exp(-float(logps.mean()))


def count(model: torch.nn.Module) -> int:
    """Parameters; tied ones once."""
    return sum(p.numel() for p in model.parameters())


def set_generation(model: KimiLinearForCausalLM, source: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The source's end tokens: some models (Llama 3) have several, and would not stop without them."""
    ends = source.eos_token_id if source is not None and source.eos_token_id is not None else tokenizer.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id not in ends:
        ends = [tokenizer.eos_token_id, *ends]
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
