"""How much of a card may be taken by a run's engines, and by a run where several of a comparison share one."""

from __future__ import annotations

import math

# Of a card's memory, for all engines on it together: beside the learner, or apart from it (`rollout.cards`), where
# each still needs room for a copy of the weights that it receives.
CARD_SHARE = 0.4
OWN_CARD_SHARE = 0.8


def part(share: float) -> float:
    """`share` of a card as Ray can hold it: it counts in steps of 1/10,000, and parts must fit into the whole."""
    return math.floor(share * 10_000 + 1e-6) / 10_000


def card_share() -> float:
    """The part of a card that this process's run has: that of the placement group it lives in; 1 outside of any."""
    import ray

    group = ray.util.get_current_placement_group() if ray.is_initialized() else None
    return 1.0 if group is None else min(1.0, group.bundle_specs[0].get("GPU", 1.0))


def whole_cards() -> int:
    """Whole cards that this process's run may use: the cluster's, or those of the placement group it lives in."""
    import ray

    group = ray.util.get_current_placement_group()
    return int(ray.cluster_resources().get("GPU", 0) if group is None else group.bundle_specs[0].get("GPU", 0))
