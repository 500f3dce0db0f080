"""Gradients of sharded parameters: FSDP gives them to ordinary backward passes only."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradbal._utils.dtensor import check_arrived, check_placed, own_part
from gradbal._utils.torch_private import ones_at
from gradbal.graph.heads_and_trunk import Plan
from gradbal.graph.losses import Batch


def harvest(
    params: Sequence[Tensor],
    tops: Sequence[Tensor] | Sequence[GradientEdge],
    seeds: Sequence[Tensor | None],
    *,
    retain_graph: bool,
) -> dict[int, Tensor]:
    """Do an ordinary backward pass, and take away what it leaves in ``.grad``.

    Args:
        params: All parameters of the optimizer; what is in their ``.grad`` stays there.
        tops: Where the pass begins.
        seeds: Initial gradients; None for 1.
        retain_graph: Keep the graph.

    Returns:
        What this process holds of each parameter's gradient, by number.
    """
    before = [param.grad for param in params]
    found = {}
    try:
        for param in params:
            param.grad = None
        torch.autograd.backward(tops, seeds, retain_graph=retain_graph)
        check_placed(params)
        for number, param in enumerate(params):
            if param.grad is not None:
                found[number] = own_part(param.grad, param)
    finally:
        for param, grad in zip(params, before, strict=True):
            param.grad = grad
    return found


def harvest_rows(
    params: Sequence[Tensor], batch: Batch, scale: Tensor | None, *, retain_graph: bool
) -> dict[int, dict[int, Tensor]]:
    """Do a backward pass for each task; return gradients by parameter and task.

    Args:
        params: All parameters of the optimizer.
        batch: The losses.
        scale: Factor on all gradients; None for 1.
        retain_graph: Keep the graph, also after the last pass.
    """
    rows: dict[int, dict[int, Tensor]] = {}
    last = batch.tasks[-1]
    for task, loss, seed in zip(batch.tasks, batch.losses, batch.seeds(scale), strict=True):
        grads = harvest(params, [loss], [seed], retain_graph=retain_graph or task != last)
        for number, grad in grads.items():
            rows.setdefault(number, {})[task] = grad
    check_arrived(rows, params)
    return rows


@contextmanager
def replaced(edges: Sequence[GradientEdge], values: Mapping[int, Tensor]) -> Iterator[None]:
    """Let a pass go on below these edges with other gradients than those that arrive.

    Args:
        edges: Where.
        values: The gradient at each edge, by position; nothing where there is none.
    """

    def replace(i: int, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        at = edges[i].output_nr
        return (*grads[:at], values.get(i), *grads[at + 1 :])

    nodes: list[Any] = [edge.node for edge in edges]
    hooks = [node.register_prehook(partial(replace, i)) for i, node in enumerate(nodes)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def pull_whole(
    params: Sequence[Tensor],
    plan: Plan,
    seeds: Sequence[Tensor | None],
    weights: Tensor | None,
    values: Mapping[int, Tensor],
    *,
    retain_graph: bool,
) -> dict[int, Tensor]:
    """Go down from the losses in one ordinary pass, with other gradients from the cut on.

    Args:
        params: All parameters of the optimizer.
        plan: The plan.
        seeds: Initial gradient of each loss; None for 1.
        weights: On the parameters above the cut, shape ``[m]``; None for plain gradients.
        values: The gradient at each edge of the cut, by position; nothing where there is none.
        retain_graph: Keep the graph.

    Returns:
        As :func:`harvest`.
    """
    if weights is not None:
        ones = map(ones_at, plan.roots)
        pairs = zip(ones, seeds, weights.tolist(), strict=True)
        seeds = [one * w if seed is None else seed * w for one, seed, w in pairs]
    with replaced(plan.cut, values):
        found = harvest(params, plan.roots, seeds, retain_graph=retain_graph)
    check_arrived(found, params)
    return found
