"""From losses to task gradients: plan, heads, crossing and sink put together."""

import weakref
from collections.abc import Mapping, Sequence
from operator import is_

import torch
from torch import Tensor

from gradbal import crossing
from gradbal.arguments import Groups, assign_groups, numbers_in, parameter_list
from gradbal.aside import Aside
from gradbal.crossing import Segment
from gradbal.decision import MODEL, Decision
from gradbal.engines import Engine, Representation
from gradbal.graph import Plan, make_plan, members, several
from gradbal.heads import Heads, Sink, descend
from gradbal.log import Log
from gradbal.losses import Batch
from gradbal.pending import Rows as PendingRows
from gradbal.phases import phase
from gradbal.representation import boundary, check_marks, gram_only, watch
from gradbal.sinks import Further, GramOnly, Keep
from gradbal.task_gradients import TaskGradients


class Descent:
    """Compute task gradients. Holds what is reused from step to step and nothing that is saved.

    Args:
        base: Whose parameters count.
        engine: How cotangents are taken down.
        shared: Parameters to treat as shared; None to find them.
        groups: How shared parameters are grouped.
        norms_only: Whether the rule looks at the lengths of task gradients alone.
        everything: Treat all parameters as shared.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        engine: Engine,
        shared: Sequence[Tensor] | None,
        groups: Groups,
        *,
        norms_only: bool = False,
        everything: bool = False,
    ) -> None:
        self.base, self.engine, self.groups = base, engine, groups
        self.everything = everything
        self.crossing = engine.crossing()
        self.keep = Keep()
        self.params: list[Tensor] = []
        self.index: dict[int, int] = {}
        self.grouped: dict[int, str] = {}
        self.log = Log()
        self.walked = self.hidden = self.foreign = False
        self.shared: set[int] | None = None
        self.known: Mapping[int, int] = {}  # tasks of each parameter in the step before
        self.common: set[int] = set()  # those of several tasks among them
        self.refresh()
        if shared is not None and not everything:
            self.shared = numbers_in(shared, self.index)
        assign_groups(groups, (), self.index)  # raises now if a group names strangers
        modules = engine.modules if isinstance(engine, Representation) else ()
        self.n_modules = len(modules)
        self.tag = object() if modules else None
        for hook in watch(modules, self.tag):
            weakref.finalize(self, hook.remove)  # the modules outlive their optimizers
        self.pool = isinstance(engine, Representation) and engine.pool is not None
        self.mixed = norms_only or self.pool

    def refresh(self) -> dict[int, int] | None:
        """Notice parameters that joined, left or were replaced.

        Returns:
            The new number of each old parameter that is still there, or None if all stand where
            they stood.
        """
        params = parameter_list(self.base)
        if len(params) == len(self.params) and all(map(is_, params, self.params)):
            return None
        old, self.params = self.params, params
        self.index = {id(param): number for number, param in enumerate(params)}
        self.keep, self.grouped = Keep(), {}
        moved = {n: self.index[id(p)] for n, p in enumerate(old) if id(p) in self.index}
        if self.everything:
            self.shared = set(self.index.values())
        elif self.shared is not None:
            self.shared = {moved[number] for number in self.shared if number in moved}
        return moved

    def plan(self, batch: Batch, known: Mapping[int, int], *, found: bool = False) -> Plan:
        """Walk the graph.

        Args:
            batch: The present losses.
            known: Tasks that reached each parameter in earlier steps.
            found: Cut where the graphs meet, also if the engine names modules.

        Raises:
            ValueError: If the losses reach no parameter of the optimizer.
            RuntimeError: If the engine looks at a representation and there is none.
        """
        tag = None if found else self.tag
        looks = isinstance(self.engine, Representation) and not found
        with phase("plan"):
            plan = make_plan(
                batch.edges, batch.tasks, self.index, known=known, shared=self.shared, tag=tag
            )
        if not plan.reached and not plan.hidden:
            raise ValueError(
                "MTLOptimizer: the losses reach no parameter of the base optimizer; build it with "
                "the parameters of the model that made them."
            )
        if tag is not None:
            check_marks(plan, self.n_modules, mixed=self.mixed)
        elif looks and not plan.cut and sum(map(bool, plan.above)) > 1:
            raise RuntimeError(
                "Representation: the tasks' graphs meet in parameters only, so there is no "
                "representation to look at; name a module or choose another engine."
            )
        self.log.about(plan)
        self.walked, self.hidden, self.foreign = True, plan.hidden, plan.foreign > 0
        return plan

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
        heads, shared = Heads(), self.shared_numbers(known)
        m, n_batches = len(batch.tasks), 1 + len(further)
        sink: Keep | GramOnly
        if at_cut or isinstance(self.engine, Representation):
            if further:
                raise ValueError(
                    "Representation: gradients at the inputs of different batches share no space, "
                    "so they cannot be compared; choose another engine, such as Sequential."
                )
            sink = gram_only(plan, len(self.params), pool=self.pool and not at_cut)
            edges, seeds = boundary(plan), batch.seeds(scale)
            keep = retain_graph or len(edges) > len(plan.cut)  # some lie in the trunk
            for cotangent in descend(
                plan, self.params, seeds, heads, sink, edges=edges, retain_graph=keep
            ):
                sink.held.append(cotangent.values)
        else:
            sink, plans = self.keep, [plan, *(other for other, _ in further)]
            last = len(further)  # batches may come from one forward pass
            segments = [
                self.engine.segment(one, self.params, retain_graph or place < last)
                for place, one in enumerate(plans)
            ]
            apart = set[int]()
            for one, segment in zip(plans, segments, strict=True):
                apart |= one.sparse.union(one.trunk[i] for i in segment.layers)
            group = self._group(shared)
            sink.open(self.params, group, apart, n_rows * n_batches, m * n_batches)
            self._cross(plan, segments[0], batch.seeds(scale), heads, sink)
            for place, (other, losses) in enumerate(further, 1):
                later = Further(sink, place * m)
                self._cross(other, segments[place], losses.seeds(scale), Heads(), later)
            sink.close()
        return self._collected(batch.tasks, heads, sink, plan.reached, shared, n_batches)

    def rows(
        self, plan: Plan, batch: Batch, scale: Tensor | None, *, retain_graph: bool
    ) -> PendingRows:
        """Compute the task gradients of everything, by parameter and task.

        Raises:
            RuntimeError: If the engine makes no rows.
        """
        if isinstance(self.engine, Representation):
            raise RuntimeError(
                "Representation: its rows belong to the inputs of one batch, so they cannot be "
                "accumulated; use Sequential or Batched."
            )
        heads, aside = Heads(), Aside(batch.tasks, plan.reached)
        segment = self.engine.segment(plan, self.params, retain_graph)
        self._cross(plan, segment, batch.seeds(scale), heads, aside)
        for task, grads in zip(batch.tasks, heads.grads, strict=True):
            for number, grad in grads.items():
                aside.rows.setdefault(number, {})[task] = grad
        return aside.rows

    def from_rows(
        self, rows: PendingRows, tasks: list[int], known: Mapping[int, int], n_rows: int
    ) -> TaskGradients:
        """Put rows that were set aside back into the form of one batch.

        Args:
            rows: Gradients, by parameter and task.
            tasks: Numbers of the tasks.
            known: Tasks that ever reached each parameter.
            n_rows: Number of tasks that may ever be present.
        """
        position = {task: i for i, task in enumerate(tasks)}
        heads, shared = Heads([{} for _ in tasks]), self.shared_numbers(known)
        sparse = {n for n, column in rows.items() if any(g.is_sparse for g in column.values())}
        self.keep.open(self.params, self._group(shared), sparse, n_rows, len(tasks))
        for number, column in rows.items():
            for task, grad in column.items():
                if number in shared:
                    self.keep.take([number], crossing.Rows(position[task], [grad]))
                else:
                    heads.grads[position[task]][number] = grad
        self.keep.close()
        reached = {n: sum(1 << task for task in column) for n, column in rows.items()}
        return self._collected(tasks, heads, self.keep, reached, shared)

    def direction(
        self, plan: Plan, gradients: TaskGradients, decision: Decision, *, retain_graph: bool
    ) -> dict[int, Tensor]:
        """Return the gradient of every parameter: heads, trunk and what lies beside it."""
        sink = gradients.sink
        out = gradients.heads.direction(decision.heads)
        if decision.direction is not None:
            shared = sink.like_rows(decision.direction)
        elif isinstance(sink, Keep):
            in_place = all(self.params[number].grad is None for number in sink.groups)
            shared = sink.direction(decision.shared.get, in_place=in_place)
        else:
            shared = sink.direction(decision.shared[MODEL]) if gradients.members else {}
        if isinstance(sink, GramOnly):
            pulled = self._pull(plan, shared, retain_graph)
            shared = {n: g for n, g in shared.items() if n < len(self.params)} | pulled
        return out | shared

    def shared_numbers(self, known: Mapping[int, int]) -> set[int]:
        """Return the parameters that are shared, now or by what was seen before."""
        if self.shared is not None:
            return self.shared
        if known != self.known:
            self.known = dict(known)
            self.common = {number for number, tasks in known.items() if several(tasks)}
        return self.common

    def _cross(
        self, plan: Plan, segment: Segment, seeds: Sequence[Tensor | None], heads: Heads, sink: Sink
    ) -> None:
        """Go down through heads and trunk, giving every row to the sink."""
        top, keep = segment.top, segment.retain_graph
        cotangents = descend(plan, self.params, seeds, heads, sink, edges=top, retain_graph=keep)
        for rows in self.crossing(segment, cotangents):
            sink.take(plan.trunk, rows)

    def _pull(
        self, plan: Plan, values: Mapping[int, Tensor], retain_graph: bool
    ) -> dict[int, Tensor]:
        """Take one gradient per edge of the cut, numbered on, down through the trunk."""
        first = len(self.params)
        pairs = [(edge, values[n]) for n, edge in enumerate(plan.cut, first) if n in values]
        if not pairs or not plan.trunk:
            return {}
        grads = torch.autograd.grad(
            [edge for edge, _ in pairs],
            [self.params[number] for number in plan.trunk],
            [value for _, value in pairs],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        found = zip(plan.trunk, grads, strict=True)
        return {number: grad for number, grad in found if grad is not None}

    def _group(self, shared: set[int]) -> dict[int, str]:
        if self.grouped.keys() != shared:
            self.grouped = assign_groups(self.groups, sorted(shared), self.index)
        return self.grouped

    def _collected(
        self,
        tasks: list[int],
        heads: Heads,
        sink: Keep | GramOnly,
        reached: Mapping[int, int],
        shared: set[int],
        n_batches: int = 1,
    ) -> TaskGradients:
        """Add which tasks reach which group."""
        sets: dict[str, int] = {}
        pairs = {
            (MODEL if isinstance(sink, GramOnly) else self.grouped[number], bits)
            for number, bits in reached.items()
            if number in shared
        }
        for group, bits in pairs:
            sets[group] = sets.get(group, 0) | bits
        position = {task: i for i, task in enumerate(tasks)}
        found = {g: sorted(position[task] for task in members(bits)) for g, bits in sets.items()}
        groups = dict(sorted(found.items()))
        return TaskGradients(tasks, heads, sink, groups, self._eps(shared), n_batches)

    def _eps(self, shared: set[int]) -> float:
        single = any(self.params[number].dtype != torch.float64 for number in shared)
        return torch.finfo(torch.float32 if single else torch.float64).eps
