"""What the card does while some code runs, by torch's profiler: how long it works, and on what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def card_work(run: Callable[[], Any], largest: int = 12) -> dict[str, Any]:
    """Run once. Needs a card.

    Returns: `card_s`, seconds in which the card works, which against the wall clock say whether the host keeps it
    waiting; `launches`; and of the `largest` kernels `kernels`, rows of name, seconds and calls.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return summarise(found, largest)


def summarise(found: Any, largest: int = 12) -> dict[str, Any]:
    """The same of a profile that is through."""
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    return {
        "card_s": sum(event.self_device_time_total for event in events) / 1e6,
        "launches": sum(event.count for event in events if event.self_device_time_total),
        "kernels": [
            {"name": event.key[:100], "seconds": event.self_device_time_total / 1e6, "calls": event.count}
            for event in events[:largest]
        ],
    }
