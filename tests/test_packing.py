"""Padded batches to packed rows and back. No model: random batches, and what must hold for all of them."""

import random

import pytest
import torch

from kimi_rl.learner.packing import cost_of, group_by_prompt, pack, plan, regroup, scatter, tokens_of, unpad
from kimi_rl.model.flops import ForwardCost, forward_cost
from kimi_rl.model.presets import build_config
from kimi_rl.recipe import ModelSection

COST = ForwardCost(per_token=100.0, per_pair=1.0, per_score=10.0)


def padded(prompts, completions):
    """(ids, mask, width of the completions) as TRL lays them out: prompts to the right, completions to the left."""
    left, right = max(map(len, prompts)), max(1, max(map(len, completions)))
    ids = torch.zeros(len(prompts), left + right, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        for row, values in ((ids, [*prompt, *completion]), (mask, [1] * (len(prompt) + len(completion)))):
            row[i, left - len(prompt) : left + len(completion)] = torch.tensor(values)
    return ids, mask, right


def random_batch(groups=3, group_size=4, longest=30, empty=0.1):
    """Groups of the same prompt, shuffled; now and then a completion that is masked out."""
    prompts, completions = [], []
    for _ in range(groups):
        prompt = [random.randint(5, 90) for _ in range(random.randint(1, longest))]
        for _ in range(group_size):
            prompts.append(prompt)
            length = 0 if random.random() < empty else random.randint(1, longest)
            completions.append([random.randint(5, 90) for _ in range(length)])
    order = random.sample(range(len(prompts)), len(prompts))
    return [prompts[i] for i in order], [completions[i] for i in order]


@pytest.fixture(autouse=True, params=range(5))
def seed(request):
    random.seed(request.param)
    torch.manual_seed(request.param)


@pytest.mark.parametrize("share", [False, True])
def test_every_scored_token_comes_back_to_its_place(share):
    """Score a token by itself and by what lies before it in its row: any mistake in an index shows."""
    prompts, completions = random_batch()
    ids, mask, width = padded(prompts, completions)
    samples = unpad(ids, mask, width)
    packs = [pack(part, share_prompts=share) for part in plan(samples, 60, COST, share_prompts=share)]
    values = []
    for p in packs:
        row, before = p.input_ids[0], p.input_ids[0, p.scored_places]
        assert p.input_ids.shape == p.positions.shape == (1, p.segments.length)
        assert len(row) == tokens_of(samples, share) or len(packs) > 1
        values.append((1000 * before + p.scored_tokens).double() + p.positions[0, p.scored_places] / 100)
    got = scatter(values, packs, (len(ids), width))
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        whole = [*prompt, *completion]
        expected = [
            1000 * whole[len(prompt) + j - 1] + token + (len(prompt) + j - 1) / 100
            for j, token in enumerate(completion)
        ]
        assert got[i].tolist() == pytest.approx([*expected, *[0] * (width - len(completion))])


@pytest.mark.parametrize("share", [False, True])
def test_sequences_in_a_pack_are_the_samples(share):
    """Following the borders and parents gives each sample's own tokens, no more and no fewer."""
    prompts, completions = random_batch(empty=0.0)
    samples = unpad(*padded(prompts, completions))
    p = pack(samples, share_prompts=share)
    bounds, parents = p.segments.bounds, p.segments.parents
    tokens = [p.input_ids[0, a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
    found = [tokens[parent] + own if parent >= 0 else own for own, parent in zip(tokens, parents, strict=True)]
    whole = [[*s.prompt.tolist(), *s.completion.tolist()] for s in samples]
    if share:
        groups = group_by_prompt(samples)
        found = found[len(groups) :]
        assert p.segments.roots == len(groups) == 3
        whole = [[*s.prompt.tolist(), *s.completion.tolist()] for group in groups for s in group]
    assert found == whole


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("budget", [1, 45, 200, 10_000])
def test_packs_keep_to_the_budget_and_lose_nothing(share, budget):
    samples = unpad(*padded(*random_batch(groups=5)))
    packs = plan(samples, budget, COST, share_prompts=share)
    assert sorted(s.row for part in packs for s in part) == sorted(s.row for s in samples)
    for part in packs:
        assert len(part) == 1 or tokens_of(part, share) <= budget
    if budget == 10_000:
        assert len(packs) == 1


def test_packs_cost_about_the_same():
    lengths = [int(x) for x in torch.empty(64).log_normal_(5.5, 0.6).clamp(1, 800)]
    samples = unpad(*padded([[7]] * 64, [[5] * n for n in lengths]))
    packs = plan(samples, 4096, COST, share_prompts=False)
    costs = [cost_of(part, COST, False) for part in packs]
    assert len(packs) > 2
    # Longest first is within a third of the best there is, and here much nearer.
    assert max(costs) < 1.2 * sum(costs) / len(costs), costs


def test_a_group_that_does_not_fit_is_cut_and_each_part_has_the_prompt():
    samples = unpad(*padded([[1, 2, 3]] * 6, [[9] * 10] * 6))
    packs = plan(samples, 25, COST, share_prompts=True)
    assert [len(part) for part in packs] == [2, 2, 2]
    assert all(tokens_of(part, True) == 23 for part in packs)


def test_masked_completions_are_not_run():
    ids, mask, width = padded([[1, 2], [3]], [[4, 5], [6]])
    mask[0, 2:] = 0
    (only,) = unpad(ids, mask, width)
    assert only.row == 1 and only.completion.tolist() == [6] and only.columns.tolist() == [0]


def test_a_completion_without_a_prompt_is_refused():
    ids, mask, width = padded([[1], [3]], [[4], [6]])
    mask[1, 0] = 0
    with pytest.raises(ValueError, match="row 1"):
        unpad(ids, mask, width)


def test_scatter_carries_gradients():
    samples = unpad(*padded([[1], [2]], [[3, 4], [5]]))
    p = pack(samples, share_prompts=False)
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out = scatter([values], [p], (2, 2))
    assert out.tolist() == [[1, 2], [3, 0]]
    assert torch.autograd.grad((out * torch.tensor([[1.0, 10], [100, 1000]])).sum(), values)[0].tolist() == [1, 10, 100]


def test_regrouping_keeps_rows_whole_and_brings_groups_together():
    prompts, completions = random_batch(groups=3, group_size=4, empty=0.0)
    ids, mask, width = padded(prompts, completions)
    batch = {
        "prompt_ids": ids[:, :-width],
        "prompt_mask": mask[:, :-width],
        "completion_ids": ids[:, -width:],
        "texts": [f"row {i}" for i in range(12)],
        "advantages": torch.arange(12.0),
        "num_items_in_batch": torch.tensor(77),
        "ref_per_token_logps": None,
    }
    cut = [
        {k: v[i : i + 4] if k not in ("num_items_in_batch", "ref_per_token_logps") else v for k, v in batch.items()}
        for i in (0, 4, 8)
    ]
    done = regroup(cut)
    rows = [int(x) for part in done for x in part["advantages"]]
    assert sorted(rows) == list(range(12))
    assert [text for part in done for text in part["texts"]] == [f"row {i}" for i in rows]
    for part in done:
        numbers = part["advantages"].long()
        assert torch.equal(part["completion_ids"], batch["completion_ids"][numbers])
        assert len({tuple(prompts[i]) for i in numbers.tolist()}) == 1, "as many rows as a group has: one group"
        assert part["num_items_in_batch"] == 77 and part["ref_per_token_logps"] is None
    first_seen = list(dict.fromkeys(tuple(p) for p in prompts))
    assert [tuple(prompts[int(part["advantages"][0])]) for part in done] == first_seen


def config(**section):
    return build_config(ModelSection(**section), vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def test_cost_of_a_forward_is_counted_by_hand():
    built = config(arch="mla", size="tiny", overrides={"num_hidden_layers": 1, "intermediate_size": 256})
    cost = forward_cost(built)
    q, kv_a, kv_b, o = 128 * 4 * 48, 128 * (64 + 16), 64 * 4 * (32 + 32), 4 * 32 * 128
    assert cost.per_token == 2 * (q + kv_a + kv_b + o + 3 * 128 * 256)
    assert cost.per_pair == 2 * 4 * (48 + 32)
    assert cost.per_score == 2 * 128 * 100
    # 3 tokens see 1 + 2 + 3; two more after them 4 + 5.
    assert cost.of([(3, 0), (2, 3)], scored=2) == 5 * cost.per_token + 15 * cost.per_pair + 2 * cost.per_score


def test_only_the_chosen_experts_cost():
    dense_router = forward_cost(config(mlp="moe"))
    all_experts = forward_cost(config(mlp="moe", overrides={"num_experts_per_tok": 8}))
    expert = 3 * 128 * 128
    assert all_experts.per_token - dense_router.per_token == pytest.approx(3 * 6 * 2 * expert)
