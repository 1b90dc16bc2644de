"""Padded batches to packed rows and back: pure functions, no model.

    [B, T] with padding  --samples-->  prompts and completions  --plan-->  packs of rows  --pack-->  one row of tokens
    [B, C] of log-probs  <-------------------------------scatter--------------------------  one number a scored token

A pack is what one forward gets: sequences end to end, without padding, and the borders between them. With shared
prompts a prompt that several rows have lies in a pack once, and their completions go on from its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kimi_rl.kernels.segments import Segments, to_device
from kimi_rl.model.flops import ForwardCost
from kimi_rl.model.modeling import NO_MASKS, KimiLinearForCausalLM


@dataclass(frozen=True)
class Sample:
    """One row without its padding. `prompt` int64 [P], `completion` int64 [C]; `columns` int64 [C] says where in the
    padded completions each token stands; `key` is the same for rows of the same prompt."""

    row: int
    prompt: torch.Tensor
    completion: torch.Tensor
    columns: torch.Tensor
    key: bytes  # hashed once, unlike a tuple

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Pack:
    """One packed row.

    input_ids int64 [1, T]; segments of its sequences; positions int64 [1, T], each token's place in its sample.
    scored_places int64 [S]: the states that predict, and scored_tokens int64 [S], what they predict; rows and columns
    int64 [S]: where the score of each goes in the padded [B, C].
    """

    input_ids: torch.Tensor
    segments: Segments
    positions: torch.Tensor
    scored_places: torch.Tensor
    scored_tokens: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


def packed_states(model: KimiLinearForCausalLM, pack: Pack) -> torch.Tensor:
    """The last hidden states [T, D] of a packed row."""
    out = model.model(
        input_ids=pack.input_ids,
        attention_mask=NO_MASKS,
        position_ids=pack.positions,
        segments=pack.segments,
        use_cache=False,
    )
    return out.last_hidden_state[0]


def whole_rows(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Token ids and mask [B, T] of a batch as TRL's trainer holds it, prompts before completions, and the completions'
    width."""
    ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask"))
    return ids, mask, batch["completion_ids"].size(1)


def unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_width: int) -> list[Sample]:
    """Rows of a padded batch whose completion has any token; the others have nothing to score.

    input_ids int64 and attention_mask [B, T], on the CPU: prompts padded on the left, then `completion_width` columns
    of completions padded on the right. Raises `ValueError` for a completion without a prompt: nothing predicts its
    first token.
    """
    prompts, prompt_mask = input_ids[:, :-completion_width], attention_mask[:, :-completion_width].bool()
    completions, mask = input_ids[:, -completion_width:], attention_mask[:, -completion_width:].bool()
    prompt_lengths, lengths = prompt_mask.sum(1).tolist(), mask.sum(1).tolist()
    rows = zip(
        prompts[prompt_mask].split(prompt_lengths),
        completions[mask].split(lengths),
        mask.nonzero()[:, 1].split(lengths),
        strict=True,
    )
    samples = []
    for row, (prompt, completion, columns) in enumerate(rows):
        if not lengths[row]:
            continue
        if not prompt_lengths[row]:
            raise ValueError(f"row {row}: a completion of {lengths[row]} tokens without a prompt before it")
        samples.append(Sample(row, prompt, completion, columns, prompt.numpy().tobytes()))
    return samples


def group_by_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples of the same prompt together, in order of first appearance."""
    groups: dict[bytes, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.key, []).append(sample)
    return list(groups.values())


def tokens_of(samples: Sequence[Sample], share_prompts: bool) -> int:
    """Tokens that these samples take in a pack."""
    if not share_prompts:
        return sum(sample.length for sample in samples)
    return sum(
        len(group[0].prompt) + sum(len(s.completion) for s in group) for group in group_by_prompt(samples)
    )


def cost_of(samples: Sequence[Sample], cost: ForwardCost, share_prompts: bool) -> float:
    """Operations of a forward over these samples in one pack."""
    scored = sum(len(s.completion) for s in samples)
    if not share_prompts:
        return cost.of([(s.length, 0) for s in samples], scored)
    sequences = []
    for group in group_by_prompt(samples):
        prompt = len(group[0].prompt)
        sequences += [(prompt, 0), *((len(s.completion), prompt) for s in group)]
    return cost.of(sequences, scored)


def plan(samples: Sequence[Sample], budget: int, cost: ForwardCost, *, share_prompts: bool) -> list[list[Sample]]:
    """Samples in packs of at most `budget` tokens each, few packs of about equal cost.

    A sample above the budget gets a pack of its own. With shared prompts the samples of one prompt stay together unless
    they do not fit into one pack: then they are cut into parts, and each part brings the prompt along.
    """
    items: list[list[Sample]] = []
    for group in group_by_prompt(samples) if share_prompts else [[s] for s in samples]:
        items += _cut(group, budget, share_prompts) if len(group) > 1 else [group]
    sizes = [tokens_of(item, share_prompts) for item in items]
    costs = [cost_of(item, cost, share_prompts) for item in items]
    count = max(1, -(-sum(sizes) // budget)) if items else 0
    while True:
        packs = _fill(sizes, costs, count, budget)
        if packs is not None:
            return [[s for i in sorted(pack) for s in items[i]] for pack in packs if pack]
        count += 1


def _cut(group: list[Sample], budget: int, share_prompts: bool) -> list[list[Sample]]:
    """Parts of at most `budget` tokens of a group; in order, each as full as it gets."""
    parts: list[list[Sample]] = []
    used = 0
    for sample in group:
        more = len(sample.completion) if share_prompts else sample.length
        if parts and used + more <= budget:
            parts[-1].append(sample)
            used += more
        else:
            parts.append([sample])
            used = sample.length
    return parts


def _fill(sizes: list[int], costs: list[float], count: int, budget: int) -> list[list[int]] | None:
    """Dearest item first, each to the cheapest of `count` packs that has room; None if one finds no room.

    An item above the budget goes into an empty pack.
    """
    packs: list[list[int]] = [[] for _ in range(count)]
    used, spent = [0] * count, [0.0] * count
    for i in sorted(range(len(sizes)), key=lambda i: -costs[i]):
        room = [p for p in range(count) if used[p] + sizes[i] <= budget or not packs[p]]
        if not room:
            return None
        best = min(room, key=lambda p: spent[p])
        packs[best].append(i)
        used[best] += sizes[i]
        spent[best] += costs[i]
    return packs


def pack(samples: Sequence[Sample], *, share_prompts: bool, device: torch.device | str = "cpu") -> Pack:
    """One packed row of these samples, in their order, on `device`."""
    if share_prompts:
        return _pack_shared(group_by_prompt(samples), device)
    pieces = [piece for sample in samples for piece in (sample.prompt, sample.completion)]
    bounds = [0, *itertools.accumulate(sample.length for sample in samples)]
    firsts = [start + len(sample.prompt) for start, sample in zip(bounds, samples, strict=False)]
    positions = _ranges([0] * len(samples), [sample.length for sample in samples])
    places = _ranges(firsts, _completion_lengths(samples)) - 1
    return _pack(samples, pieces, positions, places, Segments(bounds, device=device))


def _pack_shared(groups: list[list[Sample]], device: torch.device | str) -> Pack:
    """All prompts first, then all completions, each with its prompt for a parent."""
    samples = [sample for group in groups for sample in group]
    parents = [-1] * len(groups) + [number for number, group in enumerate(groups) for _ in group]
    prompts = [group[0].prompt for group in groups]
    pieces = [*prompts, *(sample.completion for sample in samples)]
    bounds = [0, *itertools.accumulate(map(len, pieces))]
    positions = _ranges([0] * len(groups) + [len(s.prompt) for s in samples], list(map(len, pieces)))
    lengths = _completion_lengths(samples)
    places = _ranges(bounds[len(groups) : -1], lengths) - 1
    # A completion's first token is predicted by its prompt's last.
    ends = torch.tensor(bounds[1:])[parents[len(groups) :]]
    places[torch.tensor([0, *itertools.accumulate(lengths[:-1])])] = ends - 1
    return _pack(samples, pieces, positions, places, Segments(bounds, parents, device=device))


def pack_whole(
    tokens: torch.Tensor, starts: Sequence[int], lengths: Sequence[int], rows: Sequence[int], device: torch.device | str
) -> Pack:
    """One packed row of whole texts, in which every token but the first of a text is scored, on `device`.

    tokens int64 [N], on the CPU: text n begins at starts[n], has lengths[n] of them, and its scores go to row rows[n].
    A few operations over all texts.
    """
    bounds = [0, *itertools.accumulate(lengths)]
    ids, positions = tokens[_ranges(list(starts), list(lengths))], _ranges([0] * len(lengths), list(lengths))
    places = positions[1:].nonzero().flatten()  # before every token that is not a text's first
    return _on_device(
        Segments(bounds, device=device),
        input_ids=ids.unsqueeze(0),
        positions=positions.unsqueeze(0),
        scored_places=places,
        scored_tokens=ids[places + 1],
        rows=torch.tensor(rows).repeat_interleave(torch.tensor(lengths) - 1),
        columns=positions[places],
    )


def _completion_lengths(samples: Sequence[Sample]) -> list[int]:
    return [len(sample.completion) for sample in samples]


def _ranges(starts: list[int], lengths: list[int]) -> torch.Tensor:
    """int64: start, start + 1, ... of each, `length` numbers long, one after the other."""
    counts = torch.tensor(lengths)
    shifts = torch.tensor(starts) - counts.cumsum(0) + counts
    return shifts.repeat_interleave(counts) + torch.arange(sum(lengths))


def _pack(samples, pieces, positions, places, segments: Segments) -> Pack:
    return _on_device(
        segments,
        input_ids=torch.cat(pieces).unsqueeze(0),
        positions=positions.unsqueeze(0),
        scored_places=places,
        scored_tokens=torch.cat([sample.completion for sample in samples]),
        rows=torch.tensor([s.row for s in samples]).repeat_interleave(torch.tensor(_completion_lengths(samples))),
        columns=torch.cat([sample.columns for sample in samples]),
    )


def _on_device(segments: Segments, **tensors: torch.Tensor) -> Pack:
    """The pack of these, which lie on the CPU, where the segments are."""
    return Pack(segments=segments, **{name: to_device(tensor, segments.device) for name, tensor in tensors.items()})


def scatter(values: Sequence[torch.Tensor], packs: Sequence[Pack], shape: tuple[int, int]) -> torch.Tensor:
    """Scores of each pack [S] to their places in [B, C], zeros elsewhere. Differentiable."""
    rows, columns = torch.cat([p.rows for p in packs]), torch.cat([p.columns for p in packs])
    flat = torch.cat(list(values))
    return flat.new_zeros(shape).index_put((rows, columns), flat)


def regroup(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in as many batches of the same size, rows of one prompt next to each other.

    Prompts come in the order in which they first appear. `batches` are dictionaries as TRL's trainer cuts them from
    one generation batch: `prompt_ids`, `prompt_mask` [b, P], more tensors and lists of b rows; scalars and None stay.
    """
    size = len(batches[0]["prompt_ids"])
    keys = [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["prompt_ids"].cpu(), batch["prompt_mask"].cpu(), strict=True)
    ]
    first: dict[tuple[int, ...], int] = {}
    for key in keys:
        first.setdefault(key, len(first))
    order = sorted(range(len(keys)), key=lambda i: first[keys[i]])  # stable

    def rearranged(name: str) -> list[Any]:
        parts = [batch[name] for batch in batches]
        if isinstance(parts[0], torch.Tensor) and parts[0].ndim > 0:
            whole = torch.cat(parts)[order]
            return list(whole.split(size))
        if isinstance(parts[0], list):
            whole = [value for part in parts for value in part]
            return [[whole[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
        return parts

    columns = {name: rearranged(name) for name in batches[0]}
    return [{name: parts[i] for name, parts in columns.items()} for i in range(len(batches))]
