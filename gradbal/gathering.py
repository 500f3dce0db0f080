"""The task gradients of one call: of this batch, and of what was put aside before it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradbal.calls import Call, aux_gradients
from gradbal.core import Core
from gradbal.descent import Descent
from gradbal.graph import Plan
from gradbal.losses import Batch
from gradbal.survey import Survey, survey
from gradbal.task_gradients import TaskGradients


@dataclass
class Gathered:
    """Task gradients with what belongs to them.

    Attributes:
        plan: The plan of the newest batch.
        known: Tasks that ever reached each parameter, as bit sets.
        gradients: The task gradients.
        losses: The losses, shape ``[m]``.
        aux: Gradients of auxiliary losses, by parameter.
    """

    plan: Plan
    known: dict[int, int]
    gradients: TaskGradients
    losses: Tensor
    aux: dict[int, Tensor]

    @property
    def tasks(self) -> list[int]:
        """Numbers of the present tasks."""
        return self.gradients.tasks

    def survey(self, scale: Tensor | None, *, grams: bool, capturable: bool) -> Survey:
        """Look at Gram matrices, losses and whether everything is finite, in one trip."""
        return survey(
            self.gradients.grams if grams else lambda scaled: {},
            self.losses,
            [*self.gradients.heads.owned(), *((-1, grad) for grad in self.aux.values())],
            scale,
            capturable=capturable,
        )


def gather(
    descent: Descent,
    core: Core,
    batch: Batch,
    scale: Tensor | None,
    call: Call,
    further: Sequence[Batch] = (),
    *,
    at_cut: bool,
) -> Gathered | None:
    """Compute the task gradients of a batch and add what was put aside before.

    Args:
        descent: Computes them.
        core: Holds what is pending.
        batch: The present losses.
        scale: Factor on all gradients; None for 1.
        call: The arguments of the call.
        further: Losses of further batches with the same tasks.
        at_cut: Stay at the cut, whatever the engine.

    Returns:
        None if this batch is put aside, too.
    """
    plans = [descent.planner.plan(losses, core.sets, found=at_cut) for losses in (batch, *further)]
    plan = plans[0]
    if any(plan.hidden for plan in plans):
        raise RuntimeError(
            "MTLOptimizer: a reentrant checkpoint hides its parameters from the graph, so their "
            "task gradients cannot be computed; pass use_reentrant=False to torch's checkpoint."
        )
    if not at_cut:
        in_parts = call.accumulate or further or bool(core.pending)
        descent.planner.choose(core, plan, whole=not in_parts)
    known = core.sets
    for one in plans:
        known = _united(known, one.reached)
    aux = aux_gradients(call.aux_batch, descent.params, scale)
    count, retain = len(core.names), call.retain_graph
    if not call.accumulate and not core.pending:
        gradients = descent.gather(
            plan,
            batch,
            known,
            scale,
            count,
            at_cut=at_cut,
            retain_graph=retain,
            further=list(zip(plans[1:], further, strict=True)),
        )
        return Gathered(plan, known, gradients, batch.values, aux)
    piece = descent.rows(plan, batch, scale, retain_graph=retain)
    if call.accumulate:
        core.pending = core.pending.plus(piece, batch.by_task(), aux)
        core.sets = known
        return None
    whole = core.pending.plus(piece, batch.by_task(), aux)
    tasks = sorted(whole.losses)
    gradients = descent.from_rows(whole.rows, tasks, known, count)
    losses = torch.stack([whole.losses[task] for task in tasks])
    return Gathered(plan, known, gradients, losses, whole.aux)


def _united(known: dict[int, int], reached: Mapping[int, int]) -> dict[int, int]:
    """Return the union of bit sets, by key; the first argument itself if that is all."""
    if reached.items() <= known.items():
        return known
    return {**known, **{key: known.get(key, 0) | tasks for key, tasks in reached.items()}}
