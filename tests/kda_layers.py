"""Random inputs of a KDA layer's decoding step, and a comparison of any of its forms with the plain one."""

import torch

from kimi_rl.kernels.kda_step import kda_step_reference


def make_layer(
    dtype, batch=3, heads=2, key_dim=8, value_dim=6, width=4, length=3, slots=None, states=None, device="cpu"
):
    """Positional and keyword arguments of one step, random."""

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, dtype=dtype, device=device)

    states = states or batch
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    channels = heads * (2 * key_dim + value_dim)
    wide = draw(batch, channels)  # q, k and v as slices of one projection
    q, k, v = wide.split([heads * key_dim, heads * key_dim, heads * value_dim], dim=-1)
    state = draw(states, heads, key_dim, value_dim, dtype=kept).transpose(-1, -2)
    inputs = [q, k, v, draw(batch, heads * key_dim), draw(batch, heads), draw(batch, heads * value_dim)]
    options = {
        "conv_weight": draw(channels, width, dtype=kept),
        "A_log": draw(heads, dtype=kept),
        "dt_bias": draw(heads * key_dim, dtype=kept),
        "norm_weight": draw(value_dim),
        "eps": 1e-5,
        "slots": None if slots is None else torch.tensor(slots, device=device),
    }
    return [*inputs, draw(states, channels, length), state], options


def copied(inputs):
    """The same with states of their own, in the same layout."""
    return [*inputs[:6], inputs[6].clone(), inputs[7].clone(memory_format=torch.preserve_format)]


def compare(form, inputs, options, *, tokens=3, **tolerance):
    """Several steps of `form` beside the reference's, from the same states: outputs and states agree."""
    ours, plain = copied(inputs), copied(inputs)
    for token in range(tokens):
        fresh = [x.roll(token, dims=0) for x in inputs[:6]]
        a, b = form(*fresh, *ours[6:], **options), kda_step_reference(*fresh, *plain[6:], **options)
        for x, y in zip((a, *ours[6:]), (b, *plain[6:]), strict=True):
            torch.testing.assert_close(x, y, **tolerance)
    assert not torch.equal(ours[7], inputs[7]) and not torch.equal(ours[6], inputs[6]), "states move in place"
