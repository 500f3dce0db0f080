"""What an optimizer says about itself: a check of its gradients, and an explanation in words."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gradbal._utils.torch_private import output_metadata
from gradbal.auto import explained
from gradbal.blocks import MODEL
from gradbal.core import Core
from gradbal.crossing import Layer
from gradbal.decision import Decision
from gradbal.descent import Descent
from gradbal.engines import Representation
from gradbal.gram import outside_autocast
from gradbal.graph import members
from gradbal.harvest import harvest, harvest_rows
from gradbal.losses import Batch
from gradbal.rule import GradientRule, LossRule, Rule
from gradbal.sharded import own_part
from gradbal.walk import walk_graph

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
    nodes = walk_graph(batch.edges, batch.tasks).order
    dtypes = {output.dtype for node in nodes for output in output_metadata(node)}
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)


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
        decision = Decision({MODEL: weights})
        gathered = descent.gather(plan, batch, known, None, len(core.names), retain_graph=True)
        alone, _ = descent.direction(plan, gathered, decision, retain_graph=True)
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


@torch.no_grad()
def explain(descent: Descent, core: Core, batch: Batch | None) -> str:
    """Say in words what is shared, where the cut is, and what a step costs."""
    rule, engine = core.rule, descent.planner.engine
    lines = [f"Rule {type(rule).__name__}: looks at {_looks_at(rule)}."]
    if descent.planner.chooser is None:
        lines.append(f"Engine {type(engine).__name__}.")
    if batch is None:
        lines.append("Pass the losses of one batch to learn what is shared and what a step costs.")
        return "\n".join(lines)
    plan = descent.planner.plan(batch, core.sets, found=descent.planner.tag is None)
    if descent.planner.chooser is not None and not plan.sharded:
        descent.planner.choose(core, plan, whole=True)
        lines.append(explained(core.choice, plan))
    m = len(batch.tasks)
    if plan.sharded:
        common = sorted(descent.roles.shared(core.sets))
        lines += [
            "The parameters are sharded by fully_shard, which hides them from the graph; as far as "
            f"the steps so far have shown, the tasks share {_count(descent, common)}.",
            _cost(descent, rule, m, common, {}),
        ]
        return "\n".join(lines)
    shared = sorted({*plan.trunk, *(n for above in plan.above for n in above)})
    beside = sorted(set(shared) - set(plan.trunk))
    lines.append(
        f"{m} tasks share {_count(descent, shared)}; {_count(descent, beside)} of them are met "
        "above or beside the cut."
    )
    for i, task in enumerate(batch.tasks):
        lines.append(f"  {core.names[task]}: {_count(descent, plan.own[i])} of its own.")
    partly = [n for n in shared if 1 < len(members(plan.reached[n])) < m]
    if partly:
        lines.append(f"  {_count(descent, partly)} are shared by some of the tasks only.")
    if plan.foreign:
        lines.append(f"  {plan.foreign} parameters belong to no group and are left alone.")
    edges = ", ".join(edge.node.name() for edge in plan.cut)
    lines.append(
        f"Cut: {edges}."
        if edges
        else "Cut: none; the graphs meet in parameters only, or not at all."
    )
    layers = descent.planner.trunk(plan, retain_graph=True).layers
    products = {plan.trunk[i]: layer for i, layer in layers.items()}
    lines.append(_cost(descent, rule, m, shared, products))
    return "\n".join(lines)


def _looks_at(rule: Rule) -> str:
    if isinstance(rule, LossRule):
        return "the losses alone"
    return (
        "every gradient entry" if isinstance(rule, GradientRule) else "inner products of gradients"
    )


def _count(descent: Descent, numbers: list[int]) -> str:
    total = sum(descent.params[number].numel() for number in numbers)
    return f"{total:,} parameters in {len(numbers)} tensors"


def _cost(
    descent: Descent, rule: Rule, m: int, shared: list[int], products: Mapping[int, Layer]
) -> str:
    if isinstance(rule, LossRule):
        return "A step costs one ordinary pass."
    if isinstance(descent.planner.engine, Representation):
        return f"A step costs {m} passes through the heads and one through the trunk."
    if not descent.planner.engine.keeps:
        return f"A step costs {m} passes through the trunk, piece by piece, and one through all."
    if descent.roles.some:
        return (
            f"A step costs {m} passes down to the parameters in `gram_over`, and one through all."
        )
    size = 0
    for number in shared:
        param, layer = descent.roles.held[number], products.get(number)
        kept = param.numel() if layer is None else sum(use.sizes.brought for use in layer.uses)
        size += kept * param.element_size()
    once = f", forms the gradients of {_count(descent, list(products))} once" if products else ""
    return (
        f"A step costs {m} passes through the trunk{once} and keeps {m} x {size / 2**20:.1f} MiB "
        "of task gradients."
    )
