import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_rl.kernels.segments import Segments


class NoReads(TorchDispatchMode):
    """Fails where the host would read a number from a tensor: on a card it waits there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        if func is torch.ops.aten.index_put_.default:  # on a card it reads its smallest and its largest index
            assert len(args) < 4 or not args[3]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parents", [[0, 0, 1, 1, 1], [1, 0, 2, 0, 0]])
def test_children_are_summed_in_order_and_without_a_read(parents):
    """From the first layout's last parent nothing goes on; the second's children are out of order."""
    torch.manual_seed(0)
    segments = Segments([0, 3, 6, 9, 10, 12, 13, 17, 17], [-1, -1, -1, *parents])
    values = torch.randn(5, 2, 4, 3)
    expected = torch.zeros(3, 2, 4, 3).index_put_((torch.tensor(parents),), values, accumulate=True)
    with NoReads():
        got = segments.sum_over_children(values)
    assert torch.equal(got, expected)
