import random

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from kimi_rl.kernels.segments import Segments
from kimi_rl.kernels.varlen_attention import (
    torch_sdpa,
    varlen_attention,
    varlen_attention_reference,
    varlen_attention_torch,
)
from kimi_rl.kernels.varlen_attention.flex import (
    BLOCK,
    block_mask,
    block_tables,
    padded_length,
    varlen_attention_flex,
)
from kimi_rl.kernels.varlen_attention.reference import visible

H, K, V = 2, 24, 16  # q and k are wider than v, as in MLA


def segments_of(lengths, parents=None):
    return Segments([0, *torch.tensor(lengths).cumsum(0).tolist()], parents)


def shared():
    """Two prompts, one whole sequence, and completions of both prompts out of order."""
    lengths = [random.randint(1, 40) for _ in range(3)] + [random.randint(1, 60) for _ in range(6)]
    return segments_of(lengths, [-1, -1, -1, 0, 2, 0, 2, 2, 0])


def plain():
    return segments_of([33, 1, random.randint(1, 80), 20, 30, 0, 31])


def long():
    """Long enough for the fused form of masked attention."""
    return segments_of([5, 270, 300, 3], [-1, 0, 0, 0])


def make_inputs(length, dtype=torch.float64):
    return [torch.randn(length, H, size, dtype=dtype, requires_grad=True) for size in (K, K, V)]


def results(form, inputs, segments):
    o = form(*inputs, segments, scale=0.3)
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).reshape(o.shape)
    return [o, *torch.autograd.grad((o * weights).sum(), inputs)]


@pytest.mark.parametrize("layout, times", [(plain, 3), (shared, 3), (long, 1)])
def test_matches_the_reference_with_gradients(layout, times):
    for _ in range(times):
        segments = layout()
        inputs = make_inputs(segments.length)
        expected = results(varlen_attention_reference, inputs, segments)
        for a, b in zip(results(varlen_attention, inputs, segments), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [plain, shared])
def test_the_block_mask_of_flex_attention_says_the_same(layout):
    """FlexAttention has a plain form for CPU tensors; the rule and the padding are those that a card uses."""
    segments = layout()
    inputs = [x.detach() for x in make_inputs(segments.length, torch.float32)]
    expected = varlen_attention_reference(*inputs, segments, scale=0.3)
    got = varlen_attention_flex(*inputs, segments, scale=0.3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


LAYOUTS = [
    ([900, 130, 0, 700, 257, 300, 1, 600, 0, 260], [-1] * 5 + [0, 0, 3, 1, 4]),
    ([70, 300, 128, 128, 513, 300, 1, 600, 0, 260], [-1] * 5 + [0, 0, 3, 1, 4]),
    ([600, 50, 40, 0, 300, 257], [-1] + [0] * 5),  # blocks of several siblings, and of a prompt's end and their begin
    ([0, 500, 300, 200], [-1, -1, 0, 1]),  # a parent without tokens
    ([300, 200, 128], None),
]


@pytest.mark.parametrize("lengths, parents", LAYOUTS)
def test_tables_of_blocks_say_what_the_rule_says(lengths, parents):
    segments = segments_of(lengths, parents)
    size = padded_length(segments)
    seen = torch.zeros(size, size, dtype=torch.bool)
    seen[: segments.length, : segments.length] = visible(segments)
    padding = size - segments.length
    seen[segments.length :, segments.length :] = torch.ones(padding, padding).tril().bool()
    blocks = seen.unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK)).permute(0, 2, 1, 3).flatten(2)
    some, every = (torch.from_numpy(x) for x in block_tables(segments))
    assert torch.equal(some, blocks.any(-1)) and torch.equal(every, blocks.all(-1)) and every.any()


@pytest.mark.parametrize("lengths, parents", LAYOUTS)
def test_the_block_mask_is_the_one_that_flex_attention_derives(lengths, parents):
    """By rows it is given, by columns PyTorch would make the tables itself."""
    mask = block_mask(segments_of(lengths, parents))
    by_rows = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    derived = BlockMask.from_kv_blocks(*by_rows, BLOCK_SIZE=BLOCK, mask_mod=mask.mask_mod)
    assert mask.seq_lengths == derived.seq_lengths and mask.BLOCK_SIZE == derived.BLOCK_SIZE
    for counts, places in (("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")):
        count, expected = getattr(mask, counts), getattr(derived, counts)
        assert torch.equal(count, expected) and count.dtype == expected.dtype
        read = torch.arange(count.shape[-1]) < count[..., None]  # what stands behind is not
        got, expected = getattr(mask, places), getattr(derived, places)
        assert torch.equal(got[read], expected[read]) and got.dtype == expected.dtype


def test_a_continuation_sees_what_the_whole_sequence_would():
    """Prompt and completion apart give what they give in one piece."""
    prompt, first, second = 17, 9, 26
    q, k, v = (x.detach() for x in make_inputs(prompt + first + second))
    o = varlen_attention(q, k, v, segments_of([prompt, first, second], [-1, 0, 0]), scale=0.3)
    for start, end in ((prompt, prompt + first), (prompt + first, prompt + first + second)):
        rows = [*range(prompt), *range(start, end)]
        whole = varlen_attention(q[rows], k[rows], v[rows], segments_of([len(rows)]), scale=0.3)
        torch.testing.assert_close(o[rows], whole, rtol=1e-10, atol=1e-12)


def leak(form) -> float:
    """How much other sequences change when the tokens of one completion are replaced."""
    segments = shared()
    inputs = [x.detach() for x in make_inputs(segments.length)]
    tokens = slice(*segments.bounds[4:6])
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[tokens] = torch.randn_like(x[tokens])
    difference = form(*inputs, segments, scale=0.3) - form(*changed, segments, scale=0.3)
    difference[tokens] = 0
    return float(difference.abs().max())


@pytest.mark.parametrize("form", [varlen_attention_torch, varlen_attention_reference, varlen_attention_flex])
def test_nothing_leaks_between_completions(form):
    assert leak(form) == 0.0


def test_a_leak_is_detected():
    def without_borders(q, k, v, segments, **kwargs):
        return varlen_attention_torch(q, k, v, segments_of([segments.length]), **kwargs)

    assert leak(without_borders) > 1e-3


def test_sequences_of_about_one_length_share_a_call():
    segments = segments_of([50, 5, 48, 4, 0, 9, 8], [-1, -1, -1, -1, -1, 0, 0])
    assert torch_sdpa.batches(segments) == [[0, 2], [1, 3], [5, 6]]


@pytest.mark.parametrize(
    "bounds, parents, message",
    [
        ([1, 4], None, "start with 0"),
        ([0, 4, 3], None, "must not decrease"),
        ([0, 4, 5], [-1], "one number a sequence"),
        ([0, 4, 5, 6], [-1, 0, -1], "come first"),
        ([0, 4, 5, 6], [-1, 0, 1], "name one of these 1"),
        ([0, 4, 5], [0, 0], "name one of these 0"),
    ],
)
def test_bad_segments_are_named(bounds, parents, message):
    with pytest.raises(ValueError, match=message):
        Segments(bounds, parents)


def test_segments_that_do_not_cover_the_row_are_refused():
    with pytest.raises(ValueError, match="packed length 9"):
        varlen_attention(*(x.detach() for x in make_inputs(9)), segments_of([8]), scale=1.0)


def test_what_lies_before_a_sequence_and_its_chunks():
    """A prompt of two tokens has no third before its completion."""
    segments = Segments([0, 5, 7, 10, 14], [-1, -1, 0, 1])
    places, there = segments.before(3)
    assert [p[t].tolist() for p, t in zip(places, there, strict=True)] == [[], [], [2, 3, 4], [5, 6]]
    assert there[3].tolist() == [False, True, True]
    assert segments.chunk_indices(4).tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [3, 0]]
