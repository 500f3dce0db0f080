"""From the losses down to the cut: each head is differentiated once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gradbal._utils.devices import on_device
from gradbal._utils.dtensor import own_part
from gradbal._utils.torch_private import ones_at
from gradbal.graph.heads_and_trunk import Plan
from gradbal.graph.walk import Boundary
from gradbal.jacobian.pull import Cotangent, Rows, Segment, pull
from gradbal.solvers.gram import added


class Sink(Protocol):
    """What takes rows of task gradients."""

    def take(self, numbers: Sequence[int], rows: Rows) -> None:
        """Take the gradients of some tasks for some parameters, given by number."""


@dataclass
class Heads:
    """Gradients of parameters that belong to one task, by task and parameter."""

    grads: list[dict[int, Tensor]] = field(default_factory=list)

    def owned(self) -> list[tuple[int, Tensor]]:
        """Return every gradient with the position of its task."""
        return [(task, grad) for task, grads in enumerate(self.grads) for grad in grads.values()]

    def direction(self, weights: Sequence[float] | Tensor | None) -> dict[int, Tensor]:
        """Return each parameter's gradient, times its task's weight if there are weights."""
        out: dict[int, Tensor] = {}
        for task, grads in enumerate(self.grads):
            for number, grad in grads.items():
                if weights is not None:
                    if isinstance(weights, Tensor):
                        weights = on_device(weights, grad.device)
                    grad = (grad * weights[task]).to(grad.dtype)
                out[number] = added(out[number], grad) if number in out else grad
        return out


def descend(
    plan: Plan,
    params: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    heads: Heads,
    sink: Sink,
    *,
    edges: Boundary,
    retain_graph: bool,
) -> Iterator[Cotangent]:
    """Differentiate one head after the other, each when its cotangents are asked for.

    Gradients of the task's own parameters go to ``heads``, those of shared parameters beside the
    cut to ``sink``.

    Args:
        plan: The plan.
        params: All parameters of the optimizer.
        seeds: Initial gradient of each loss.
        heads: Takes own gradients.
        sink: Takes shared gradients beside the cut.
        edges: Where cotangents are wanted.
        retain_graph: Keep all of the graph; else each head's part goes at once, if it is its own.
    """
    last, below = len(plan.roots) - 1, bool(plan.trunk)
    passing = not plan.apart or len(edges) > len(plan.cut)  # something wanted may lie below an edge
    for task, root in enumerate(plan.roots):
        own, above = plan.own[task], plan.above[task]
        inputs: list[Any] = [*edges, *(params[number] for number in (*own, *above))]  # both kinds
        keep = retain_graph or (not plan.apart and (task < last or below))
        grads: Sequence[Tensor | None] = ()
        if passing and inputs:
            seed = ones_at(root) if seeds[task] is None else seeds[task]
            grads = pull(Segment((root,), inputs, keep, hooked=False), [seed]).grads
        elif inputs:
            grads = torch.autograd.grad(
                [root], inputs, [seeds[task]], retain_graph=keep, allow_unused=True
            )
        numbers = (*own, *above)
        beside = [
            own_part(g, params[n]) for g, n in zip(grads[len(edges) :], numbers, strict=False)
        ]
        pairs = zip(own, beside, strict=False)
        heads.grads.append({number: grad for number, grad in pairs if grad is not None})
        if above:
            sink.take(above, Rows(task, beside[len(own) :]))
        yield Cotangent(task, grads[: len(edges)], task == last)
