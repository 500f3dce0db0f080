"""From losses to task gradients: plan, heads, crossing and sink put together."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from gradbal.distributed import ALONE, Processes
from gradbal.distributed.fsdp import harvest_rows, pull_whole
from gradbal.graph.cost import entries_at
from gradbal.graph.heads_and_trunk import Plan
from gradbal.graph.losses import Batch
from gradbal.graph.parameters import BESIDE, MODEL
from gradbal.graph.segments import Piece
from gradbal.jacobian.blocks import Workspace
from gradbal.jacobian.by_parameter import ByParameter, RowsByParameter
from gradbal.jacobian.dense import Further, Keep
from gradbal.jacobian.engines import Representation
from gradbal.jacobian.head_passes import Heads, Sink, descend
from gradbal.jacobian.planner import Planner
from gradbal.jacobian.pull import Rows, Segment, pull
from gradbal.jacobian.representation import Represented, boundary, represented
from gradbal.jacobian.streamed import GramOnly, Streamed
from gradbal.jacobian.task_gradients import AnySink, TaskGradients
from gradbal.solvers.gram import ROW_NOISE


class Descent:
    """Compute task gradients. Holds what is reused from step to step and nothing that is saved.

    Args:
        planner: Plans the way.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner, self.roles = planner, planner.roles
        self.workspace = Workspace()
        self.meet(ALONE)

    def meet(self, processes: Processes) -> None:
        """Go on with these processes, which each have a part of the batch."""
        self.processes, self.keep = processes, Keep(processes=processes)
        self.planner.alone = processes.size == 1 and not self.roles.shards

    @property
    def params(self) -> list[Tensor]:
        """All parameters of the optimizer."""
        return self.roles.params

    @contextmanager
    def apart(self) -> Iterator["Descent"]:
        """Compute the task gradients of this process' part of the batch, for a while."""
        processes = self.processes
        self.meet(ALONE)
        try:
            yield self
        finally:
            self.meet(processes)

    def refresh(self) -> dict[int, int] | None:
        """Notice parameters that joined, left or were replaced, see :meth:`Roles.refresh`."""
        moved = self.roles.refresh()
        if moved is not None:
            self.meet(self.processes)
        return moved

    def gather(
        self,
        plan: Plan,
        batch: Batch,
        known: Mapping[int, int],
        scale: Tensor | None,
        n_rows: int,
        *,
        at_cut: bool = False,
        retain_graph: bool = False,
        further: Sequence[tuple[Plan, Batch]] = (),
    ) -> TaskGradients:
        """Compute the task gradients, down to the parameters or only to the cut.

        Args:
            plan: The plan.
            batch: The present losses.
            known: Tasks that ever reached each parameter, this batch included.
            scale: Factor on all gradients; None for 1.
            n_rows: Number of tasks that may ever be present.
            at_cut: Stay at the cut, whatever the engine.
            retain_graph: Keep the graph.
            further: Plans and losses of further batches with the same tasks.
        """
        heads, shared, engine = Heads(), self.roles.shared(known), self.planner.engine
        even = self.processes.even  # else the tasks' graphs differ, and so would the pieces
        in_one = not even or bool(self.roles.shards)
        whole = (engine.keeps and not self.roles.some) or in_one
        self.planner.check_batches(bool(further), at_cut=at_cut, whole=whole, even=even)
        sink: AnySink
        if at_cut or isinstance(engine, Representation):
            sink = self._represent(plan, batch.seeds(scale), heads, at_cut, retain_graph)
        elif whole:
            pairs = [(plan, batch), *further]
            seeds = [losses.seeds(scale) for _, losses in pairs]
            plans = [one for one, _ in pairs]
            sink = self._keep(plans, seeds, heads, shared, n_rows, retain_graph)
        else:
            sink = self._stream(plan, batch.seeds(scale), heads, shared, n_rows, retain_graph)
        found = self._collected(batch.tasks, heads, sink, plan, shared, 1 + len(further))
        if plan.sharded and isinstance(sink, Represented):
            here = [i for i, v in enumerate(sink.held) if any(one is not None for one in v)]
            return replace(found, members={MODEL: here}, seeds=batch.seeds(scale))
        return found

    def _represent(
        self,
        plan: Plan,
        seeds: Sequence[Tensor | None],
        heads: Heads,
        at_cut: bool,
        retain_graph: bool,
    ) -> Represented:
        """Go down through the heads only."""
        pool = self.planner.pool and not at_cut
        sink = represented(plan, len(self.params), self.processes, pool=pool)
        edges = boundary(plan)
        keep = retain_graph or len(edges) > len(plan.cut)  # some lie in the trunk
        keep |= plan.sharded  # heads are gone through again, with the trunk
        for _ in sink.holding(
            descend(plan, self.params, seeds, heads, sink, edges=edges, retain_graph=keep)
        ):
            pass
        return sink

    def _keep(
        self,
        plans: Sequence[Plan],
        seeds: Sequence[Sequence[Tensor | None]],
        heads: Heads,
        shared: set[int],
        n_rows: int,
        retain_graph: bool,
    ) -> Keep:
        """Go down through the whole trunk of every batch and keep the rows."""
        sink, last = self.keep, len(plans) - 1  # batches may come from one forward pass
        segments = [
            self.planner.trunk(one, retain_graph=retain_graph or i < last)
            for i, one in enumerate(plans)
        ]
        apart = set[int]()
        for one, segment in zip(plans, segments, strict=True):
            apart |= one.sparse.union(one.trunk[i] for i in segment.layers)
        m, b = len(plans[0].tasks), len(plans)
        sink.open(self.roles.held, self.roles.group(shared), apart, n_rows * b, m * b)
        self._cross(plans[0], segments[0], seeds[0], heads, sink)
        for i in range(1, b):
            self._cross(plans[i], segments[i], seeds[i], Heads(), Further(sink, i * m))
        sink.close()
        return sink

    def _stream(
        self,
        plan: Plan,
        seeds: Sequence[Tensor | None],
        heads: Heads,
        shared: set[int],
        n_rows: int,
        retain_graph: bool,
    ) -> Streamed:
        """Go down through the trunk piece by piece, and keep inner products only."""
        m, group = len(plan.tasks), self.roles.group(shared)
        self.roles.check_counted(shared, plan.reached)
        beside = {n: group[n] for n in sorted({n for above in plan.above for n in above})}
        held = self.roles.held
        self.keep.open(held, beside, plan.sparse, n_rows, m)
        piece = Keep(self.workspace, self.processes)
        sink = Streamed(
            m, len(plan.cut), len(self.params), held, self.keep, piece, self.planner.reads
        )
        arriving = sink.holding(
            descend(
                plan, self.params, seeds, heads, sink, edges=plan.cut, retain_graph=retain_graph
            )
        )
        sizes = {n: self.params[n].numel() for n in plan.trunk if group[n] == MODEL}
        pieces = self.planner.engine.pieces(plan.cut, self.roles.index, sizes) if sizes else []
        if not self.processes.same(repr([numbers for _, _, numbers in pieces])):
            pieces = [Piece(plan.cut, (), list(sizes))]
        for top, bottom, numbers in pieces:
            params = [self.params[number] for number in numbers]
            structure = m, len(plan.nodes), tuple(numbers)
            segment = Segment(
                top, params, True, bottom=bottom, numbers=numbers, structure=structure
            )
            segment = self.planner.with_layers(segment, plan)._replace(hooked=plan.cut)
            apart = plan.sparse.union(numbers[i] for i in segment.layers)
            arriving = sink.meet(numbers, apart, self.planner.crossing(segment, arriving))
        for _ in arriving:
            pass  # if there is no piece, the heads are yet to be gone through
        self.keep.close()
        return sink

    def rows(
        self, plan: Plan, batch: Batch, scale: Tensor | None, *, retain_graph: bool
    ) -> ByParameter:
        """Compute the task gradients of everything, by parameter and task.

        Raises:
            RuntimeError: If the engine makes no rows.
        """
        if isinstance(self.planner.engine, Representation):
            raise RuntimeError(
                "Representation: its rows belong to the inputs of one batch, so they cannot be "
                "accumulated; use Sequential or Batched."
            )
        if plan.sharded:
            return harvest_rows(self.params, batch, scale, retain_graph=retain_graph)
        heads, aside = Heads(), RowsByParameter(batch.tasks, plan.reached)
        segment = self.planner.trunk(plan, retain_graph=retain_graph)
        self._cross(plan, segment, batch.seeds(scale), heads, aside)
        for task, grads in zip(batch.tasks, heads.grads, strict=True):
            for number, grad in grads.items():
                aside.rows.setdefault(number, {})[task] = grad
        return aside.rows

    def from_rows(
        self,
        rows: ByParameter,
        tasks: list[int],
        plan: Plan,
        known: Mapping[int, int],
        n_rows: int,
    ) -> TaskGradients:
        """Put rows that were set aside back into the form of one batch.

        Args:
            rows: Gradients, by parameter and task.
            tasks: Numbers of the tasks.
            plan: Says which of them have gradients of which parameters, and which are sparse.
            known: Tasks that ever reached each parameter.
            n_rows: Number of tasks that may ever be present.
        """
        heads, shared = Heads([{} for _ in tasks]), self.roles.shared(known)
        group = self.roles.group(shared)
        self.keep.open(self.roles.held, group, plan.sparse, n_rows, len(tasks))
        for i, task in enumerate(tasks):
            found = {n: column[task] for n, column in rows.items() if task in column}
            here = [number for number in found if number in shared]
            self.keep.take(here, Rows(i, [found[number] for number in here]))
            heads.grads[i] = {n: grad for n, grad in found.items() if n not in shared}
        self.keep.close()
        return self._collected(tasks, heads, self.keep, plan, shared)

    def direction(
        self,
        plan: Plan,
        gradients: TaskGradients,
        weights: Mapping[str, Tensor],
        heads: Tensor | None,
        direction: Mapping[int, Tensor] | None = None,
        *,
        retain_graph: bool,
    ) -> tuple[dict[int, Tensor], set[int]]:
        """Return the gradient of every parameter: heads, trunk and what lies beside it.

        Args:
            plan: The plan.
            gradients: The task gradients.
            weights: Weights on the shared parameters of each group, shape ``[m]``.
            heads: Weights on the parameters of single tasks, shape ``[m]``; None for 1.
            direction: What an elementwise rule makes of the rows, by parameter; else None.
            retain_graph: Keep the graph.

        Returns:
            The gradients, by parameter, and the numbers of those that nobody else can hold.
        """
        sink, new = gradients.sink, set[int]()
        out = gradients.heads.direction(heads)
        if direction is not None and not isinstance(sink, Streamed):
            shared = sink.like_rows(direction)
        elif isinstance(sink, Keep):
            by_group = {**weights, BESIDE: weights.get(MODEL)}
            shared = sink.direction(by_group.get)
            new = set(shared)
        else:
            shared = sink.direction(weights[MODEL]) if gradients.members else {}
        if isinstance(sink, GramOnly) and plan.sharded:
            first = len(self.params)
            at_cut = {n - first: value for n, value in shared.items()}
            seeds = gradients.seeds
            whole = pull_whole(self.params, plan, seeds, heads, at_cut, retain_graph=retain_graph)
            return self.processes.average(whole), new
        if isinstance(sink, GramOnly):
            pulled = self._pull(plan, shared, retain_graph)
            beside = {n: g for n, g in shared.items() if n < len(self.params)}
            averaged = isinstance(sink, Streamed)
            ours = pulled if averaged else beside | pulled
            ours = self.processes.average(ours)
            shared = beside | ours if averaged else ours
        return out | shared, new

    def _cross(
        self, plan: Plan, segment: Segment, seeds: Sequence[Tensor | None], heads: Heads, sink: Sink
    ) -> None:
        """Go down through heads and trunk, giving every row to the sink."""
        top, keep = segment.top, segment.retain_graph
        cotangents = descend(plan, self.params, seeds, heads, sink, edges=top, retain_graph=keep)
        if entries_at(top) <= sum(param.numel() for param in segment.params):
            cotangents = iter(list(cotangents))  # heads first: what a pass needs stays in the cache
        for rows in self.planner.crossing(segment, cotangents):
            sink.take(plan.trunk, rows)

    def _pull(
        self, plan: Plan, values: Mapping[int, Tensor], retain_graph: bool
    ) -> dict[int, Tensor]:
        """Take one gradient per edge of the cut, numbered on, down through the trunk."""
        if not plan.trunk:
            return {}
        first, cut = len(self.params), range(len(plan.cut))
        segment = Segment(plan.cut, [self.params[n] for n in plan.trunk], retain_graph)
        found = zip(plan.trunk, pull(segment, [values.get(first + i) for i in cut])[0], strict=True)
        return {number: grad for number, grad in found if grad is not None}

    def _collected(
        self,
        tasks: list[int],
        heads: Heads,
        sink: AnySink,
        plan: Plan,
        shared: set[int],
        n_batches: int = 1,
    ) -> TaskGradients:
        """Add which tasks reach which group."""
        one = self.roles.some or isinstance(sink, GramOnly)
        groups = self.roles.members(tasks, plan.reached, shared, one=one)
        return TaskGradients(tasks, heads, sink, groups, ROW_NOISE * plan.roundoff, n_batches)
