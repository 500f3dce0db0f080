"""Compare the task gradients of an engine with ordinary backward passes of the losses."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gradbal._utils.dtensor import own_part
from gradbal.distributed.fsdp import harvest, harvest_rows
from gradbal.graph.losses import Batch
from gradbal.graph.parameters import MODEL
from gradbal.graph.walk import unit_roundoff, walk_graph
from gradbal.jacobian.compute import Descent
from gradbal.solvers.gram import outside_autocast
from gradbal.step.state import Core

TOLERANCE = 1e4  # times machine epsilon: far above rounding, far below a wrong gradient
LIMIT = 0.05  # for half precision: above rounding still, and wrong gradients are not this good


@torch.no_grad()
@outside_autocast
def check(descent: Descent, core: Core, batch: Batch) -> dict[str, float]:
    """Compare the engine's task gradients with lone passes, and their sum with one summed pass.

    The summed pass comes first, since some graphs (compiled with donated buffers) are right only
    the first time they are gone through.

    Args:
        descent: Computes task gradients.
        core: Knows the tasks.
        batch: The losses; their graph is kept.

    Returns:
        For each task the largest deviation over its largest entry; under ``"sum"`` that of the
        summed rows.

    Raises:
        RuntimeError: If one is more than rounding.
    """
    plan = descent.planner.plan(batch, core.sets, found=True)
    numbers = sorted(plan.reached)
    params = [descent.params[number] for number in numbers]

    def passed(positions: list[int]) -> dict[int, Tensor]:
        edges, seeds = [batch.edges[i] for i in positions], batch.seeds(None)
        if plan.sharded:
            tops = [batch.losses[i] for i in positions]
            return harvest(descent.params, tops, [None] * len(tops), retain_graph=True)
        grads = torch.autograd.grad(
            edges, params, [seeds[i] for i in positions], retain_graph=True, allow_unused=True
        )
        pairs = zip(numbers, grads, params, strict=True)
        return {n: own_part(g, p) for n, g, p in pairs if g is not None}

    everyone = list(range(len(batch.tasks)))
    summed = passed(everyone)
    rows = _engine_rows(descent, core, batch)
    found = {
        core.names[task]: _deviation(
            {n: c[task] for n, c in rows.items() if task in c}, passed([i])
        )
        for i, task in enumerate(batch.tasks)
    }
    total = {n: torch.stack([_dense(g) for g in c.values()]).sum(dim=0) for n, c in rows.items()}
    found["sum"] = _deviation(total, summed)
    worst = max(found, key=found.__getitem__)
    if not found[worst] <= min(TOLERANCE * _eps(batch), LIMIT):
        raise RuntimeError(
            f"check: the task gradients of {worst!r} deviate by {found[worst]:.1e} from an "
            "ordinary pass; if a part of the model is compiled, compile it after a first step of "
            "this optimizer with an empty compiler cache, or use the engine Representation."
        )
    return found


def _eps(batch: Batch) -> float:
    """Return the rounding error of the least precise gradient in the graph; autocast makes some."""
    return 2 * unit_roundoff(walk_graph(batch.edges, batch.tasks).order)


def _engine_rows(descent: Descent, core: Core, batch: Batch) -> dict[int, dict[int, Tensor]]:
    """Return the task gradients as the engine computes them, by parameter and task."""
    plan = descent.planner.plan(batch, core.sets)
    if plan.sharded:
        return harvest_rows(descent.params, batch, None, retain_graph=True)
    if descent.planner.engine.keeps and not descent.roles.some:
        return descent.rows(plan, batch, None, retain_graph=True)
    known = dict(plan.reached)
    rows: dict[int, dict[int, Tensor]] = {}
    for task, weights in zip(batch.tasks, torch.eye(len(batch.tasks)), strict=True):
        gathered = descent.gather(plan, batch, known, None, len(core.names), retain_graph=True)
        alone, _ = descent.direction(plan, gathered, {MODEL: weights}, None, retain_graph=True)
        alone |= gathered.heads.grads[batch.tasks.index(task)]
        for number, grad in alone.items():
            if plan.reached[number] >> task & 1:
                rows.setdefault(number, {})[task] = grad
    return rows


def _deviation(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> float:
    size = max((_largest(_dense(g)) for g in theirs.values()), default=0.0)
    off = 0.0
    for number in ours.keys() | theirs.keys():
        a, b = ours.get(number), theirs.get(number)
        gap = _dense(a if b is None else b) if a is None or b is None else _dense(a) - _dense(b)
        off = max(off, _largest(gap))
    return off / size if size else off


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().amax()) if tensor.numel() else 0.0


def _dense(grad: Tensor | None) -> Tensor:
    if grad is None:
        return torch.zeros(1)
    return grad.to_dense() if grad.is_sparse else grad
