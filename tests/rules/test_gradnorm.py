"""GradNorm: where a task has met its target, and in which unit that is told."""

import pytest
import torch
from cases import losses_for
from torch import Tensor

from gradbal import make_rule
from gradbal.rules._base import Context, GramRule


def slopes(norms: Tensor, losses: Tensor) -> Tensor:
    """Return the gradient of the weights, all of them 1, at initial losses of 1."""
    rule = make_rule("gradnorm", alpha=1.0, parametrization="direct")
    assert isinstance(rule, GramRule)
    ones = torch.ones_like(losses)
    ctx = Context(losses=losses, state={"weights": ones, "initial": ones})
    rule.weights(norms.square().diag(), ctx)
    return ctx.slopes["weights"]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("m", [2, 3, 8])
def test_weights_rest_where_all_norms_are_in_proportion_to_the_rates(m: int, scale: float) -> None:
    for seed in range(10):
        losses = losses_for(m, seed=seed)
        assert slopes(scale * losses, losses).tolist() == [0.0] * m


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_weights_move_where_a_norm_is_slightly_off(scale: float) -> None:
    losses = losses_for(4)
    for off in (1e-4, -1e-4, 1e-11, -1e-11):
        norms = scale * losses
        norms[1] *= 1 + off
        sign = 1.0 if off > 0 else -1.0  # the mean moves, too, and so do the other targets
        signs = torch.tensor([-sign, sign, -sign, -sign], dtype=torch.float64)
        torch.testing.assert_close(slopes(norms, losses), signs * norms)
