"""The task gradients of one call: of this batch, and of what was put aside before it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradbal.distributed import Processes
from gradbal.distributed.fsdp import harvest
from gradbal.graph.heads_and_trunk import Plan
from gradbal.graph.losses import Batch
from gradbal.jacobian.by_parameter import ByParameter, without_zero_rows
from gradbal.jacobian.compute import Descent
from gradbal.jacobian.engines import Representation
from gradbal.jacobian.task_gradients import TaskGradients
from gradbal.step.call import Call
from gradbal.step.finite import Survey, survey
from gradbal.step.one_pass import aux_gradients
from gradbal.step.state import Core


@dataclass
class Gathered:
    """Task gradients with what belongs to them.

    Attributes:
        plan: The plan of the newest batch.
        known: Tasks that ever reached each parameter, as bit sets.
        gradients: The task gradients.
        losses: The losses, shape ``[m]``.
        aux: Gradients of auxiliary losses, by parameter.
        processes: Each of which has a part of inner products and losses.
    """

    def settle(self) -> "Gathered":
        """Average what is no row of shared parameters, and learn what any process has found."""
        if self.processes.size > 1:
            heads, sink = self.gradients.heads, self.gradients.sink
            owned = {(i, n): grad for i, own in enumerate(heads.grads) for n, grad in own.items()}
            owned |= {(-1, n): grad for n, grad in self.aux.items()}
            found = self.processes.settle(owned, [(0, n) for n in sink.written])
            heads.grads = [{} for _ in heads.grads]
            self.aux = {}
            for (task, number), grad in found.grads.items():
                (self.aux if task < 0 else heads.grads[task])[number] = grad
            sink.written = {number for _, number in found.marks}
        return self

    plan: Plan
    known: dict[int, int]
    gradients: TaskGradients
    losses: Tensor
    aux: dict[int, Tensor]
    processes: Processes

    @property
    def tasks(self) -> list[int]:
        """Numbers of the present tasks."""
        return self.gradients.tasks

    def without(self, seen: Survey) -> Survey:
        """Leave the tasks out whose gradients are NaN or inf: their rows, and those of heads.

        They keep their positions, with a weight of 0 on everything, and nothing is multiplied.
        """
        gradients, bad = self.gradients, set(seen.bad)
        gradients.members = {
            group: [i for i in positions if i not in bad]
            for group, positions in gradients.members.items()
        }
        gradients.sink.drop(bad)
        for i in bad:
            gradients.heads.grads[i] = {}
        return replace(seen, bad=[], left_out=seen.bad)

    def survey(self, scale: Tensor | None, *, grams: bool, capturable: bool) -> Survey:
        """Look at Gram matrices, losses and whether everything is finite, in one trip."""
        return survey(
            self.gradients.grams if grams else lambda scaled: {},
            self.losses,
            [*self.gradients.heads.owned(), *((-1, grad) for grad in self.aux.values())],
            scale,
            self.processes,
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
    processes, planner = descent.processes, descent.planner

    def make(known: Mapping[int, int]) -> list[Plan]:
        plans = [planner.plan(losses, known, found=at_cut) for losses in (batch, *further)]
        for plan in plans:
            _check(plan)
            check_peers(plan, processes.size)
        return plans

    plans = processes.plan(make, core.sets)
    plan = plans[0]
    aux = _aux(descent, plan, batch.losses, call, scale)
    looks = at_cut or isinstance(planner.engine, Representation)
    if plan.sharded:
        _check_sharded(plan, several=bool(further), looks=looks and not at_cut)
    in_rows = plan.sharded and (plan.mixed or not looks)
    if not at_cut and not plan.sharded:
        in_parts = call.accumulate or further or bool(core.pending)
        core.choice = planner.choose(
            core.choice, plan, processes.first, whole=not in_parts, held=descent.keep.nbytes
        )
    opaque = plan.opaque and planner.reads and not looks and not further
    if in_rows or opaque or call.accumulate or core.pending:
        piece = descent.rows(plan, batch, scale, retain_graph=call.retain_graph)
        if opaque:
            piece = without_zero_rows(piece)
        return _joined(descent, core, plan, batch, call, piece, aux)
    known = core.sets
    for one in plans:
        known = _united(known, one.reached)
    gradients = descent.gather(
        plan,
        batch,
        known,
        scale,
        len(core.names),
        at_cut=at_cut,
        retain_graph=call.retain_graph,
        further=list(zip(plans[1:], further, strict=True)),
    )
    return Gathered(plan, known, gradients, batch.values, aux, processes).settle()


def _check(plan: Plan) -> None:
    """Raise if task gradients cannot be computed from a graph."""
    if plan.hidden:
        raise RuntimeError(
            "MTLOptimizer: a reentrant checkpoint hides its parameters from the graph, so their "
            "task gradients cannot be computed; pass use_reentrant=False to torch's checkpoint."
        )
    if plan.static:
        raise RuntimeError(
            "MTLOptimizer: DistributedDataParallel(static_graph=True) counts on one and the same "
            "backward pass in each step, and task gradients take several; build it without."
        )


def check_peers(plan: Plan, n_processes: int) -> None:
    """Raise if parameters are split over some of the processes, and nobody averages over the rest.

    Args:
        plan: The plan.
        n_processes: How many balance their losses together.

    Raises:
        RuntimeError: If so.
    """
    if not plan.sharded and 1 < plan.peers < n_processes:
        raise RuntimeError(
            f"MTLOptimizer: tensor parallelism splits parameters over {plan.peers} of the "
            f"{n_processes} processes, and their gradients are not averaged over the others; shard "
            "them over the data with fully_shard on a two-dimensional mesh, or pass the group of "
            "one copy as `process_group`."
        )


def _check_sharded(plan: Plan, *, several: bool, looks: bool) -> None:
    """Raise if something cannot be where parameters are sharded.

    Args:
        plan: The plan.
        several: Whether there are several batches.
        looks: Whether the rule looks at a representation.
    """
    if several:
        raise ValueError(
            "MTLOptimizer: several batches cannot be compared where parameters are sharded by "
            "fully_shard; choose a rule that takes one."
        )
    if looks and plan.mixed:
        raise RuntimeError(
            "Representation: parameters sharded by fully_shard are used by several tasks beside "
            "the representation, where their gradients cannot be told apart; name a module above "
            "which every parameter belongs to one task, or choose another engine."
        )


def _joined(
    descent: Descent,
    core: Core,
    plan: Plan,
    batch: Batch,
    call: Call,
    piece: ByParameter,
    aux: dict[int, Tensor],
) -> Gathered | None:
    """Put a piece of a batch aside, or bring it together with those put aside before."""
    seen = {} if plan.opaque else plan.reached  # what a graph shows, also without a gradient
    whole = core.pending.plus(piece, batch.by_task(), aux, seen)
    if call.accumulate:
        core.pending, core.sets = whole, _united(core.sets, {**seen, **_bits(piece)})
        return None
    found = _bits(whole.rows)
    reached = {n: found.get(n, 0) | whole.reached.get(n, 0) for n in {*found, *whole.reached}}
    sparse = {n for n, rows in whole.rows.items() if any(g.is_sparse for g in rows.values())}
    joined = replace(plan, reached=reached, sparse=sparse)
    plan = descent.processes.plan(lambda known: [joined], core.sets)[0]
    known = _united(core.sets, plan.reached)
    gradients = descent.from_rows(whole.rows, sorted(whole.losses), plan, known, len(core.names))
    losses = torch.stack([whole.losses[task] for task in gradients.tasks])
    return Gathered(plan, known, gradients, losses, whole.aux, descent.processes).settle()


def _bits(rows: ByParameter) -> dict[int, int]:
    """Return the tasks that have a gradient of each parameter, as a bit set."""
    return {number: sum(1 << task for task in column) for number, column in rows.items()}


def _aux(
    descent: Descent, plan: Plan, losses: Sequence[Tensor], call: Call, scale: Tensor | None
) -> dict[int, Tensor]:
    """Return the gradients of auxiliary losses, by parameter."""
    batch = call.aux_batch
    if batch is not None and plan.sharded:
        # what a sharded module has not seen in a pass, it would take for a part of the next one
        none = [torch.zeros_like(loss) for loss in losses]
        tops, seeds = [batch.joined, *losses], [batch.seed(scale), *none]
        return harvest(descent.params, tops, seeds, retain_graph=True)
    return aux_gradients(batch, descent.params, scale)


def _united(known: dict[int, int], reached: Mapping[int, int]) -> dict[int, int]:
    """Return the union of bit sets, by key; the first argument itself if that is all."""
    if reached.items() <= known.items():
        return known
    return {**known, **{key: known.get(key, 0) | tasks for key, tasks in reached.items()}}
