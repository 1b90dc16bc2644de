"""Decoding with every tensor in a fixed place, so that one CUDA graph holds a whole step of the model and the draw.

A step of a small model is hundreds of launches, and the host needs longer to make them than the card to run them. Here
the host starts one graph a token and looks at the tokens once in `CHUNK` steps. Rows that have stopped go on until then
and are cut; once half of the rows are through, the others move on to a decoder of half the size.

The KDA layers keep their two states and go through `kernels/kda_step`; MLA layers keep the latents of `room` tokens and
attend in their space ("absorbed"). On a CPU the same steps run without a graph.
"""

from __future__ import annotations

import copy

import torch

from kimi_rl.kernels.product import wide_product
from kimi_rl.model.modeling import DeltaAttention, KimiLinearForCausalLM, served_dtype
from kimi_rl.rollout.engine import SamplingParams
from kimi_rl.rollout.sampling import draw, processed_logprobs

CHUNK = 16  # steps between two looks at the tokens
ROOM = 256  # places for tokens come in multiples of this, so that few lengths need a graph of their own


def can_decode(model: torch.nn.Module) -> bool:
    """Whether `model` is one of ours without routers: a router's experts are chosen on the host."""
    return isinstance(model, KimiLinearForCausalLM) and "sparse" not in model.config.mlp_layer_types


class ServedWeights:
    """A model whose matrices and norms lie in the dtype that autocast would round them to at every step.

    What autocast leaves in float32 (the embedding, and with it the residual stream) is the original's own tensor.
    """

    def __init__(self, model: KimiLinearForCausalLM, dtype: torch.dtype):
        self._pairs = []
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        for name, weight in model.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, torch.nn.Linear) or "norm" in type(module).__name__.lower():
                shared[id(weight)] = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
                self._pairs.append((shared[id(weight)], weight))
        self.model = copy.deepcopy(model, shared)

    def refresh(self) -> None:
        """After an update of the original: the same places, so that graphs stay good."""
        for narrow, weight in self._pairs:
            narrow.copy_(weight)


class StaticDecoder:
    """`rows` sequences of at most `room` tokens, prompt included. Use: `load`, then `run` as often as needed."""

    def __init__(self, model: KimiLinearForCausalLM, rows: int, room: int, params: SamplingParams):
        self.model, self.rows, self.room, self.params = model, rows, room, params
        device, dtype = model.device, served_dtype(model.device.type) or model.dtype
        config = model.config

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens, self.place, self.step = (zeros(n, dtype=torch.long) for n in (rows, 1, 1))
        self.hidden_places = zeros(rows, 1, room, dtype=torch.float32)  # 0 where a token may look, -inf elsewhere
        self.noise = zeros(rows, CHUNK, dtype=torch.float64)
        self.drawn, self.logprobs = zeros(rows, CHUNK, dtype=torch.long), zeros(rows, CHUNK, dtype=torch.float32)
        self.states = []
        for layer in model.model.layers:
            attention = layer.self_attn
            if isinstance(attention, DeltaAttention):
                heads, width = attention.num_heads, attention.head_dim
                conv = zeros(rows, attention.conv_dim, attention.conv_kernel_size)
                self.states.append((conv, zeros(rows, heads, width, width, dtype=torch.float32)))
            else:
                self.states.append((zeros(rows, room, config.kv_lora_rank + config.qk_rope_head_dim),))
        self._graph = self._captured() if device.type == "cuda" else None

    def load(self, cache, mask: torch.Tensor, tokens: torch.Tensor) -> None:
        """Take over rows after their prompts: transformers' cache, mask [B, T], and the first tokens drawn [B]."""
        count, length = mask.shape
        self._place_rows(count, tokens, length)
        self.hidden_places[:count, 0, :length].masked_fill_(mask == 0, float("-inf"))
        for layer, state in zip(cache.layers, self.states, strict=True):
            if len(state) == 2:
                state[0][:count], state[1][:count] = layer.conv_states[0], layer.recurrent_states[0]
            else:
                state[0][:count, :length] = torch.cat([layer.keys[:, 0], layer.values[:, 0]], dim=-1)

    def take(self, other: StaticDecoder, keep: torch.Tensor) -> None:
        """Go on with these rows of another decoder."""
        length = int(other.place)
        self._place_rows(len(keep), other.tokens[keep], length)
        self.hidden_places[: len(keep), :, :length] = other.hidden_places[keep, :, :length]
        for mine, theirs in zip(self.states, other.states, strict=True):
            if len(mine) == 2:
                mine[0][: len(keep)], mine[1][: len(keep)] = theirs[0][keep], theirs[1][keep]
            else:
                mine[0][: len(keep), :length] = theirs[0][keep, :length]

    def run(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """At most `CHUNK` steps, one for each column of noise [B, steps]: tokens, log-probs [B, steps], on the CPU."""
        count, steps = noise.shape
        self.noise[:count, :steps] = noise
        self.step.zero_()
        for _ in range(steps):
            if self._graph is None:
                self._advance()
            else:
                self._graph.replay()
        return self.drawn[:count, :steps].cpu(), self.logprobs[:count, :steps].cpu()

    def _place_rows(self, count: int, tokens: torch.Tensor, length: int) -> None:
        self.tokens[:count] = tokens
        self.place.fill_(length)
        # Rows without a sequence see zeros: finite numbers that nobody reads.
        self.hidden_places.fill_(float("-inf"))[..., :length] = 0.0

    def _advance(self) -> None:
        """Feed the last tokens, draw the next. No tensor is read by the host."""
        hidden = self.model.model.embed_tokens(self.tokens)
        self.hidden_places.index_fill_(2, self.place, 0.0)
        for layer, state in zip(self.model.model.layers, self.states, strict=True):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            if isinstance(attention, DeltaAttention):
                x = attention.o_proj(attention.step(x, *state))
            else:
                x = attention.step(x, *state, self.place, self.hidden_places)
            hidden = hidden + x
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits = head_logits(self.model, self.model.model.norm(hidden))
        tokens, logprobs = choose_tokens(logits, self.noise.index_select(1, self.step)[:, 0], self.params)
        self.drawn.index_copy_(1, self.step, tokens[:, None])
        self.logprobs.index_copy_(1, self.step, logprobs[:, None])
        self.tokens.copy_(tokens)
        self.place += 1
        self.step += 1

    def _captured(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and lets the libraries take their memory, outside the graph
            for _ in range(2):
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        self.place.zero_()
        self.step.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._advance()
        return graph


class Decoders:
    """Decoders by size, made when first needed and kept: a graph is worth keeping."""

    def __init__(self, model: KimiLinearForCausalLM):
        self.model = model
        self._kept: dict[tuple[int, SamplingParams], StaticDecoder] = {}

    def get(self, rows: int, room: int, params: SamplingParams) -> StaticDecoder:
        """One for at least this many rows and tokens."""
        rows, room = 1 << (rows - 1).bit_length(), -(-room // ROOM) * ROOM
        params = SamplingParams(0, params.temperature, params.top_p)  # its length is no part of a step
        if any(other != params for _, other in self._kept):  # as between training and evaluation
            self._kept.clear()
        found = self._kept.get((rows, params))
        if found is None or found.room < room:
            self._kept.pop((rows, params), None)
            del found  # its memory first
            found = self._kept[rows, params] = StaticDecoder(self.model, rows, room, params)
        return found


def head_logits(model: KimiLinearForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """float32 [B, V] of states [B, D]: under autocast products of what it rounds to, as in the learner."""
    dtype = served_dtype(hidden.device.type) or hidden.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        return wide_product(hidden.to(dtype), model.lm_head.weight.to(dtype).T, torch.float32)


def choose_tokens(
    logits: torch.Tensor, noise: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] drawn from logits [B, V] with noise [B], and their log-probs [B]."""
    return draw(processed_logprobs(logits, params.temperature, params.top_p), noise, params.temperature == 0)
