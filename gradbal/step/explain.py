"""Explain in words what the tasks share, which engine is used, and what a step costs."""

from collections.abc import Mapping

import torch

from gradbal.graph.losses import Batch
from gradbal.graph.walk import members, several
from gradbal.jacobian.autotune import explained
from gradbal.jacobian.compute import Descent
from gradbal.jacobian.engines import Representation
from gradbal.jacobian.layers import Layer
from gradbal.rules._base import GradientRule, LossRule, Rule
from gradbal.step.state import Core


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
        core.choice = descent.planner.choose(core.choice, plan, whole=True)
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
    if plan.opaque and core.sets:  # which task uses what was seen in the steps so far
        lines.append("A compiled graph hides which task uses what; as far as steps have shown:")
        sets = core.sets
        shared = [n for n in shared if several(sets.get(n, plan.reached[n]))]
        plan.own = [[n for n, bits in sets.items() if bits == 1 << task] for task in batch.tasks]
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
