"""Where two float32 forwards of a mixture of experts must agree: as far as no choice of experts hangs on rounding."""

import torch


@torch.no_grad()
def settled_tokens(model, ids, margin=2e-6) -> int:
    """How many of the first tokens of `ids` [1, T] come before a close call; all of them in a dense model.

    A close call: in some layer the score of the last expert chosen is less than `margin` above that of the best one
    left out. Rounding may then choose the other one, and whatever reads this token is another.
    """
    close = torch.zeros(ids.shape[1], dtype=torch.bool)

    def look(router, _, answer):
        assert router.num_group == 1
        scores = (answer[0].sigmoid() + router.e_score_correction_bias).sort(-1, descending=True).values
        close.logical_or_(scores[:, router.top_k - 1] - scores[:, router.top_k] < margin)

    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [router.register_forward_hook(look) for router in routers]
    try:
        model(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    return int(close.nonzero()[0]) if close.any() else ids.shape[1]
