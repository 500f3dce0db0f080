"""GroupDRO against the product of exponentials, for tasks that come and go."""

import math

import pytest
import torch
from cases import seeded

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.step.weighting import MODEL


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_weights_are_products_of_exponentials(reduction: str) -> None:
    parameter, generator = torch.nn.Parameter(torch.ones(()).double()), seeded(0)
    rule = make_rule("group_dro", step_size=0.3, reduction=reduction)
    mtl_opt = MTLOptimizer(torch.optim.SGD([parameter], lr=0), rule, tasks=["a", "b", "c"])
    shares = dict.fromkeys("abc", 1.0)
    for step in range(20):
        names = "ab" if step < 5 else ("abc", "bc", "ac", "c")[step % 4]
        losses = torch.rand(len(names), generator=generator, dtype=torch.float64)
        mtl_opt.step({n: x * parameter for n, x in zip(names, losses, strict=True)})
        together = sum(shares[name] for name in names)
        grown = {
            name: shares[name] * math.exp(0.3 * loss)
            for name, loss in zip(names, losses.tolist(), strict=True)
        }
        shares |= {name: together * x / sum(grown.values()) for name, x in grown.items()}
        weights = torch.tensor([shares[name] for name in names], dtype=torch.float64)
        total = len(names) if reduction == "sum" else 1
        assert mtl_opt.last is not None
        expected = total * weights / weights.sum()
        torch.testing.assert_close(mtl_opt.last.weights, expected, rtol=1e-6, atol=0)
    expected = torch.tensor(list(shares.values()), dtype=torch.float64)
    torch.testing.assert_close(mtl_opt.core.state[MODEL]["logits"].exp(), expected)


def test_no_weight_is_lost_to_rounding() -> None:
    rule, state = make_rule("group_dro", step_size=1.0), None
    for losses in [[1, 2, 1]] * 1500 + [[2, 1, 1]] * 1499:  # the first is behind by e^1500
        result = aggregate(torch.eye(3), rule, losses=losses, state=state)
        state = result.state
    share = 1 / (1 + math.e)
    expected = torch.tensor([3 * share, 3 - 3 * share, 0], dtype=torch.float32)
    torch.testing.assert_close(result.weights, expected)
