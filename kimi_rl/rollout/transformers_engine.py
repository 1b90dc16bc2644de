"""The embedded rollout engine: batched decoding of our transformers model with its hybrid cache, no vLLM needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import DynamicCache

from kimi_rl.model.load_save import load_model
from kimi_rl.model.modeling import fuses_decoding
from kimi_rl.model.naming import load_into, to_checkpoint
from kimi_rl.model.source import is_source, load_source
from kimi_rl.rollout.engine import Completion, Request, SamplingParams
from kimi_rl.rollout.sampling import draw, processed_logprobs, uniforms
from kimi_rl.rollout.static_decode import CHUNK, Decoders, ServedWeights, can_decode, choose_tokens, head_logits
from kimi_rl.weight_sync import checksum_all


class TransformersEngine:
    """`RolloutEngine` on `KimiLinearForCausalLM`.

    Prompts are left-padded and decoded together, `batch_size` at a time; a finished sequence leaves the batch at
    once, so that a few long completions do not hold the others' rows. Precision is the learner's: fp32 weights, under
    bf16 autocast on a GPU, so that updates are served bit by bit as they were sent. On a GPU models
    without routers decode in fixed places, through a CUDA graph (`static_decode.py`; `KIMI_RL_FUSED_DECODE=0`: not). A
    plain transformer (see `model/source.py`) can be generated from as well, and takes no updates.
    """

    def __init__(
        self,
        model_folder: str,
        *,
        batch_size: int = 128,
        device: str = "cpu",
        policy_version: int = -1,
    ):
        if is_source(model_folder):
            self.model = load_source(model_folder, "model", dtype=torch.float32, device=device)
        else:
            self.model = load_model(model_folder, dtype=torch.float32, device=device).eval()
        self.model.requires_grad_(False)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.policy_version = policy_version
        self._updating = False
        self._served: ServedWeights | None = None
        self._decoders: Decoders | None = None
        config, generation = self.model.config, self.model.generation_config
        eos = config.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
        self.eos_ids = torch.tensor(eos if isinstance(eos, list) else [eos], device=self.device)
        self.pad_id = int(self.eos_ids[0]) if config.pad_token_id is None else config.pad_token_id

    # --- generation -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        if self._updating:
            raise RuntimeError(
                "the engine holds an incomplete weight update; send the whole update again before generating"
            )
        # Prompts of like length share a batch: less padding. The order of the answers is that of the requests.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        completions: list[Completion | None] = [None] * len(requests)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
                decode = self._decode_static if self._static() else self._decode
                answers = decode([requests[i] for i in rows], params)
            for row, completion in zip(rows, answers, strict=True):
                completions[row] = completion
        return completions  # type: ignore[return-value]

    def _decode(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        greedy = params.temperature == 0
        noise = uniforms([r.seed for r in requests], params.max_tokens).to(self.device)
        tokens_of: list[list[int]] = [[] for _ in requests]
        logprobs_of: list[list[float]] = [[] for _ in requests]
        stopped = [False] * len(requests)

        input_ids, mask = self._left_pad([list(r.prompt_ids) for r in requests])
        cache = DynamicCache(config=self.model.config)
        alive = torch.arange(len(requests), device=self.device)  # request of each row still decoding
        for step in range(params.max_tokens):
            logits = self.model(
                input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            logprobs = processed_logprobs(logits, params.temperature, params.top_p)
            tokens, chosen = draw(logprobs, noise[alive, step], greedy)
            is_stop = torch.isin(tokens, self.eos_ids)
            for row, token, logprob, stop in zip(
                alive.tolist(), tokens.tolist(), chosen.tolist(), is_stop.tolist(), strict=True
            ):
                tokens_of[row].append(token)
                logprobs_of[row].append(logprob)
                stopped[row] = stop
            keep = (~is_stop).nonzero().squeeze(-1)
            if keep.numel() == 0:
                break
            if keep.numel() < alive.numel():
                cache.reorder_cache(keep)
                alive, tokens, mask = alive[keep], tokens[keep], mask[keep]
            input_ids = tokens.unsqueeze(-1)
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=-1)
        return [
            Completion(tokens_of[i], logprobs_of[i], "stop" if stopped[i] else "length", self.policy_version)
            for i in range(len(requests))
        ]

    def _static(self) -> bool:
        return fuses_decoding(self.device) and can_decode(self.model)

    def _decode_static(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        if self._decoders is None:
            model = self.model
            if torch.is_autocast_enabled(self.device.type):
                self._served = ServedWeights(model, torch.get_autocast_dtype(self.device.type))
                model = self._served.model
            self._decoders = Decoders(model)
        model = self._decoders.model
        noise = uniforms([r.seed for r in requests], params.max_tokens).to(self.device)
        input_ids, mask = self._left_pad([list(r.prompt_ids) for r in requests])
        room = mask.shape[1] + params.max_tokens
        cache = DynamicCache(config=model.config)
        states = model.model(input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        first, logprobs = choose_tokens(head_logits(model, states.last_hidden_state[:, -1]), noise[:, 0], params)
        rows = [_Row(i, set(self.eos_ids.tolist())) for i in range(len(requests))]
        finished = list(rows)
        for row, token, logprob in zip(rows, first.tolist(), logprobs.tolist(), strict=True):
            row.extend([token], [logprob])
        decoder = self._decoders.get(len(rows), room, params)
        decoder.load(cache, mask, first)
        del cache, states
        done = 1
        while done < params.max_tokens:
            alive = [i for i, row in enumerate(rows) if not row.stopped]
            if not alive:
                break
            if 2 * len(alive) <= decoder.rows:
                smaller = self._decoders.get(len(alive), room, params)
                smaller.take(decoder, torch.tensor(alive, device=self.device))
                decoder, rows = smaller, [rows[i] for i in alive]
            numbers = torch.tensor([row.number for row in rows], device=self.device)
            tokens, logprobs = decoder.run(noise[numbers, done : done + CHUNK])
            done += tokens.shape[1]
            for row, more, values in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                row.extend(more, values)
        return [
            Completion(row.tokens, row.logprobs, "stop" if row.stopped else "length", self.policy_version)
            for row in finished
        ]

    def _left_pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device)

    # --- weight updates ---------------------------------------------------------------------------------------

    def begin_update(self) -> None:
        self._updating = True  # there are no caches to drop: every `generate` starts from empty ones

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        load_into(self.model, weights)

    def finish_update(self, version: int) -> None:
        if self._served is not None:
            self._served.refresh()
        self.policy_version = version
        self._updating = False

    def checksums(self) -> dict[str, int]:
        return checksum_all(to_checkpoint(self.model))

    def close(self) -> None:
        self._updating = True
        self._decoders = self._served = None
        del self.model


class _Row:
    """A completion as it grows; what comes after its stop token is dropped."""

    def __init__(self, number: int, stops: set[int]):
        self.number, self.stops = number, stops
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.stopped = False

    def extend(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.stopped:
                return
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.stopped = token in self.stops
