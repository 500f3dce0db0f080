r"""The two-parameter toy of CAGrad, Nash-MTL and FAMO: two losses with valleys on the way.

With :math:`c_\pm = \max(\tanh(\pm y / 2), 0)` the losses of a point :math:`(x, y)` are
:math:`s (c_+ h_1 + c_- q_1)` and :math:`c_+ h_2 + c_- q_2`: above :math:`y = 0` logarithms with a
valley each, whose slopes grow beyond bound, below it two bowls. The papers print the second valley
with the other sign of :math:`\tanh y`; this is the form that their programs compute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradbal.aggregation import aggregate
from gradbal.lab.checks import check_rules
from gradbal.rules._base import Rule
from gradbal.rules._registry import make_rule

LOWER, CENTRE = 5e-6, 7.0  # what the logarithm sees at least; how far out the bowls are
SIDES = torch.tensor([1.0, -1.0])  # of the first loss and of the second: each mirrors the other
NEAR = 0.05  # a point so near to the Pareto set has reached it
FRAMES = 100  # points of a path that are kept, beside the start
LR = 1e-3  # of Adam
Start = tuple[float, float]


def losses(points: Tensor, scale: float = 1.0) -> Tensor:
    """Return the two losses.

    Args:
        points: Shape ``[..., 2]``.
        scale: What the first loss is multiplied by.

    Returns:
        Shape ``[..., 2]``.
    """
    x, y = points[..., :1], points[..., 1:]
    valleys = (0.5 * (-CENTRE * SIDES - x) + SIDES * y.tanh()).abs().clamp(min=LOWER).log() + 6
    half = (y / 2).tanh()
    # At y = 0 both parts keep their slope, as in the papers' programs. Stated here, because torch
    # 2.14 changed the gradient that `clamp` passes at its bound from 1 to 0.
    above, below = torch.where(half >= 0, half, 0.0), torch.where(half <= 0, -half, 0.0)
    found = above * valleys + below * _bowls(x, y)
    return found * torch.tensor([scale, 1.0], dtype=found.dtype)


def pareto_front(x: Tensor) -> Tensor:
    r"""Return the height of the Pareto set.

    Where the gradients of both losses cancel, :math:`w_1 = (x + 7) / 14` and :math:`w_2 = 1 - w_1`
    on the bowls; the scale of a loss changes nothing. What remains is one equation for y,

    .. math:: \tfrac1{50} (y + 8) \tanh(-\tfrac y2)
        = \tfrac12 \operatorname{sech}^2(\tfrac y2) (w_1 q_1 + w_2 q_2),

    of which the left side's y is iterated; an error shrinks by half and more each time.

    Args:
        x: From -7 to 7, float64.
    """
    share = (x + CENTRE) / (2 * CENTRE)
    y = torch.full_like(x, -8)
    for _ in range(60):
        first, second = _bowls(x[..., None], y[..., None]).unbind(-1)
        mixed = share * first + (1 - share) * second
        y = -8 + 25 * mixed / (y / 2).cosh().square() / (-y / 2).tanh()
    return y


def distance(points: Tensor) -> Tensor:
    """Return how far points, shape ``[..., 2]``, are from the Pareto set, which is all but flat."""
    x, y = points.double().unbind(-1)
    nearest = x.clamp(-CENTRE, CENTRE)
    return torch.hypot(x - nearest, y - pareto_front(nearest))


def _bowls(x: Tensor, y: Tensor) -> Tensor:
    return ((x - CENTRE * SIDES).square() + 0.1 * (y + 8).square()) / 10 - 20


# ---------------------------------------------------------------------- how others ran it


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a paper's program runs the toy.

    Args:
        source: Whose program.
        starts: Where it begins.
        steps: Of Adam, with the learning rate 0.001.
        scale: Of the first loss.
        options: Of rules, by name.
        summed: Whether directions have the length of a sum of gradients rather than of a mean; a
            rule with a length of its own keeps it.
        clipped: Rules whose direction is shortened to at most 1 before Adam sees it.
    """

    source: str
    starts: tuple[Start, ...]
    steps: int
    scale: float
    options: Mapping[str, Mapping[str, Any]]
    summed: bool = True
    clipped: tuple[str, ...] = ()

    def rule(self, name: str) -> tuple[Rule, float]:
        """Return a rule, and what its direction is multiplied by."""
        check_rules("gradbal compare toy", [name])
        rule = make_rule(name, **self.options.get(name, {}))
        factors = {"mean": 2.0} if self.summed else {"sum": 0.5}
        return rule, factors.get(rule.scale, 1.0)


def _famo(scale: float) -> dict[str, Any]:
    """Return FAMO's options: losses are negative in the bowls, and it needs their lower bounds."""
    return {"gamma": 0.0, "min_losses": (-21 * scale, -21.0)}


FIVE = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
PROTOCOLS = {
    "cagrad": Protocol(
        source="Liu et al., NeurIPS 2021",
        starts=((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0)),
        steps=100_000,
        scale=1.0,
        options={"cagrad": {"c": 0.5, "rescale": "c"}, "famo": _famo(1.0)},
        summed=False,
    ),
    "nash": Protocol(
        source="Navon et al., ICML 2022",
        starts=FIVE,
        steps=35_000,
        scale=0.1,
        options={"famo": _famo(0.1)},
    ),
    "famo": Protocol(
        source="Liu et al., NeurIPS 2023",
        starts=FIVE,
        steps=50_000,
        scale=0.1,
        options={"famo": _famo(0.1)},
        clipped=("pcgrad", "cagrad", "graddrop"),  # for others its program clips before backward
    ),
}


class Way:
    """A rule that is on its way, with what it keeps from step to step.

    Args:
        name: Of the rule.
        protocol: How to run it.
        seed: Of what the rule draws.
    """

    def __init__(self, name: str, protocol: Protocol, seed: int) -> None:
        self.rule, self.factor = protocol.rule(name)
        self.clipped = name in protocol.clipped
        self.generator = torch.Generator().manual_seed(seed)
        self.state: dict[str, Any] | None = None

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        """Return where to go."""
        found = aggregate(
            jacobian, self.rule, losses=losses, state=self.state, generator=self.generator
        )
        self.state = found.state
        direction = self.factor * found.direction
        return direction / direction.norm().clamp(min=1) if self.clipped else direction


def paths(
    runs: Sequence[tuple[str, Start]], protocol: Protocol, steps: int | None = None
) -> Tensor:
    """Follow rules from where they start, all at once.

    Args:
        runs: A rule's name and where it starts, each.
        protocol: How to run them.
        steps: Fewer or more than the protocol has; None for as many.

    Returns:
        Points on the way, evenly spaced in time, shape ``[FRAMES + 1, n, 2]``.
    """
    steps = protocol.steps if steps is None else steps
    ways = [Way(name, protocol, seed) for seed, (name, _) in enumerate(runs)]
    points = torch.tensor([start for _, start in runs])
    adam = torch.optim.Adam([points], lr=LR)
    frames = [points.clone()]
    for step in range(1, steps + 1):
        seen = zip(ways, *_slopes(points, protocol.scale), strict=True)
        points.grad = torch.stack([way.direction(rows, values) for way, rows, values in seen])
        adam.step()
        if step * FRAMES // steps > (step - 1) * FRAMES // steps:
            frames.append(points.clone())
    return torch.stack(frames)


def _slopes(points: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return each point's gradients, shape ``[n, 2, 2]``, and its losses, shape ``[n, 2]``."""
    twice = points.expand(2, -1, -1).clone().requires_grad_()  # a copy for each loss: one pass
    found = losses(twice, scale).diagonal(dim1=0, dim2=2)
    (slopes,) = torch.autograd.grad(found.sum(), twice)
    return slopes.transpose(0, 1), found.detach()
