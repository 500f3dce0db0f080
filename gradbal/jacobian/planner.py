"""What is planned before going down: where the tasks meet, and with which engine to go."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch.autograd.graph import get_gradient_edge

from gradbal._utils import torch_private
from gradbal._utils.log import Log
from gradbal._utils.profiler import phase
from gradbal._utils.torch_private import order_of_creation
from gradbal.graph.heads_and_trunk import Plan, make_plan
from gradbal.graph.losses import Batch
from gradbal.graph.parameters import Roles
from gradbal.graph.walk import unit_roundoff
from gradbal.jacobian.autotune import ENGINES, Choices, Chooser
from gradbal.jacobian.engines import Engine, Factored, Representation, Sketched
from gradbal.jacobian.factored import Proof
from gradbal.jacobian.layers import Layer
from gradbal.jacobian.pull import Crossing, Segment
from gradbal.jacobian.representation import check_marks, watch


class Planner:
    """Walk the graph, choose the engine, and tell what is remarkable.

    Args:
        roles: What the parameters are.
        engine: How cotangents are taken down.
        chooser: Chooses the engine for every batch; None to use always the same.
        norms_only: Whether the rule looks at the lengths of task gradients alone.
        reads: Whether numbers may be read back from the device.

    Attributes:
        engine: The engine in use.
        crossing: How it goes through a segment.
        alone: Whether task gradients are whole in this process, so that products of their factors
            are inner products.
        seed: Of what is drawn in this step.
        names: Names of the tasks, for the log.
        reached: The tasks that reach each parameter in the newest graph walked, as a bit set.
        hidden: Whether a reentrant checkpoint or ``fully_shard`` hid a part of the newest one.
    """

    def __init__(
        self,
        roles: Roles,
        engine: Engine,
        chooser: Chooser | None,
        *,
        norms_only: bool,
        reads: bool,
    ) -> None:
        self.roles, self.chooser, self.reads = roles, chooser, reads
        self.alone = True
        self.crossings: dict[Engine, Crossing] = {}
        self.use(engine)
        self.log, self.seed = Log(), 0
        self.names: Sequence[str] = ()
        self.helps: dict[tuple[int, ...], bool] = {}
        self.proof = Proof()
        self.hidden = False
        self.reached: Mapping[int, int] = {}
        self.roundoffs: dict[tuple[int, int], float] = {}  # by number of tasks and nodes
        self.newest = 0  # when the last batch was recorded, in nodes
        self.recorded: tuple[list[int], int] | None = (
            None  # its tasks, and nodes since the one before
        )
        modules = engine.modules if isinstance(engine, Representation) else ()
        self.n_modules = len(modules)
        self.tag = object() if modules else None
        for hook in watch(modules, self.tag):
            weakref.finalize(self, hook.remove)  # the modules outlive their optimizers
        self.pool = isinstance(engine, Representation) and engine.pool is not None
        self.mixed = norms_only or self.pool

    def use(self, engine: Engine) -> None:
        """Go on with an engine."""
        self.engine = engine
        if engine not in self.crossings:
            self.crossings[engine] = engine.crossing()
        self.crossing = self.crossings[engine]

    def choose(
        self,
        choices: Choices,
        plan: Plan,
        first: Callable[[int], int] = int,
        *,
        whole: bool,
        held: Callable[[], int] = int,
    ) -> Choices:
        """Choose the engine for a batch, if it is not always the same.

        Args:
            choices: The engines settled on so far.
            plan: The plan.
            first: Gives what the first of several processes would do.
            whole: Whether the batch stands alone, so that its gradients may be dropped.
            held: Gives the bytes of the rows of the step before.

        Returns:
            The engines settled on, this batch included.
        """
        if self.chooser is not None:
            streams = whole and not self.roles.some
            choices, engine = self.chooser.choose(
                choices, plan, self.roles.params, streams=streams, products=self.alone, held=held
            )
            engines = list(ENGINES.values())
            self.use(engines[first(engines.index(engine))])
            if self.engine != engine:
                self.chooser.running = None
        return choices

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
                batch.edges,
                batch.tasks,
                self.roles.index,
                known=known,
                shared=self.roles.named,
                tag=tag,
                helps=self.helps,
            )
        size = len(plan.tasks), len(plan.nodes)
        if size not in self.roundoffs:  # a narrower dtype comes with other nodes
            self.roundoffs[size] = unit_roundoff(plan.nodes)
        plan.roundoff = self.roundoffs[size]
        plan.foreign -= min(plan.foreign, batch.n_elsewhere)  # a leaf stands for each
        if plan.foreign and self.roles.shards - plan.reached.keys() == self.roles.shards > set():
            own: list[list[int]] = [[] for _ in plan.roots]
            plan = replace(plan, sharded=True, foreign=0, own=own, above=own, trunk=[])
        known_there = plan.hidden or plan.sharded or batch.elsewhere
        if not plan.reached and not known_there:
            raise ValueError(
                "MTLOptimizer: the losses reach no parameter of the base optimizer; build it with "
                "the parameters of the model that made them."
            )
        if tag is not None and not batch.elsewhere:
            check_marks(plan, self.n_modules, mixed=self.mixed)
        elif looks and not plan.cut and sum(map(bool, plan.above)) > 1:
            raise RuntimeError(
                "Representation: the tasks' graphs meet in parameters only, so there is no "
                "representation to look at; name a module or choose another engine."
            )
        self._tell_about(plan)
        self.hidden, self.reached = plan.hidden or plan.sharded, plan.reached
        return plan

    def _tell_about(self, plan: Plan) -> None:
        """Tell what is remarkable about a graph."""
        if plan.foreign:
            self.log.tell_once(
                "foreign",
                f"{plan.foreign} parameters under the losses belong to no group of the base "
                "optimizer; their gradients are left alone.",
            )
        if plan.opaque:
            self.log.tell_once(
                "opaque",
                "One compiled graph makes what several losses need, so the recorded graph does not "
                "show which task uses which parameter. A parameter counts as one task's own as "
                "long as no other task has had a gradient of it that is not exactly zero; to be "
                "faster, compile trunk and heads apart.",
            )
        several = len(plan.tasks) > 1 and not (plan.sharded or plan.hidden or plan.opaque)
        if several and not plan.trunk and not any(plan.above):
            self.log.tell_once(
                "nothing shared",
                "The tasks share no parameter that is trained, so there is nothing to balance; is "
                "the trunk frozen, detached or run under no_grad?",
            )
        for task, other in plan.within[:1]:
            self.log.tell_once(
                "within",
                f"The loss of task {self.names[task]!r} is a part of that of "
                f"{self.names[other]!r}, or the same tensor, so its gradient counts twice; leave "
                "a sum of the losses out.",
            )
        for kind in sorted(plan.unresolved)[:1]:
            self.log.tell_once(
                "unresolved",
                f"The tasks read parts of what one operation makes ({kind}), so its parameters "
                "and all under it count as shared; if that is not meant, give each task a layer "
                "of its own, or name the shared parameters with `shared=`.",
            )

    def is_new(self, batch: Batch) -> bool:
        """Say whether the graph of a batch may differ from the last one.

        It may if other tasks have losses, or if another number of nodes was recorded since the
        last batch; both are known without a walk.
        """
        newest = order_of_creation(get_gradient_edge(batch.joined).node)
        recorded = (batch.tasks, newest - self.newest)
        known, self.newest, self.recorded = self.recorded, newest, recorded
        return recorded != known

    def check_batches(self, further: bool, *, at_cut: bool, whole: bool, even: bool) -> None:
        """Raise if batches, or parts of one in several processes, cannot be brought together.

        Args:
            further: Whether there are further batches.
            at_cut: Whether to stay at the cut.
            whole: Whether the task gradients of the whole trunk are kept.
            even: Whether all processes have losses of the same tasks.
        """
        looks = isinstance(self.engine, Representation)
        if further and looks:
            raise ValueError(
                "Representation: gradients at the inputs of different batches share no space, so "
                "they cannot be compared; choose another engine, such as Sequential."
            )
        if further and not whole:
            raise ValueError(
                f"{type(self.engine).__name__}: task gradients in a stream, or over chosen modules,"
                " are those of one batch at a time, so batches cannot be compared; choose another "
                "engine, such as Sequential, without `gram_over`."
            )
        if looks and not (at_cut or even or (self.n_modules and not self.pool)):
            raise RuntimeError(
                "Representation: the processes have losses of different tasks, so what is "
                "found in their graphs cannot be joined; name the module whose output is the "
                "representation, without `pool`, or choose another engine."
            )

    def trunk(self, plan: Plan, *, retain_graph: bool) -> Segment:
        """Return the trunk of one batch, as it is to be gone through."""
        top = plan.cut if plan.trunk else ()
        params = [self.roles.params[number] for number in plan.trunk]
        structure = len(plan.tasks), len(plan.nodes), len(top)
        segment = Segment(top, params, retain_graph, numbers=plan.trunk, structure=structure)
        return self.with_layers(segment, plan)

    def with_layers(self, segment: Segment, plan: Plan) -> Segment:
        """Return a segment with the layers whose gradients are not to be formed."""
        layers = self.layers(segment, len(plan.tasks))
        if not layers or not self.reads or isinstance(self.engine, Sketched):
            return segment._replace(layers=layers)
        self.proof.tolerance = max(1e-5, 16 * plan.roundoff)
        params, refuses = segment.params, self.proof.refuses
        layers = {i: layer for i, layer in layers.items() if not refuses(params[i])}
        return segment._replace(layers=layers, proof=self.proof)

    def layers(self, segment: Segment, n_tasks: int) -> Mapping[int, Layer]:
        """Return the layers of a segment that the engine would leave unformed, by position."""
        unknown = torch_private.missing()
        if self.alone and unknown is None:
            return self.engine.layers(segment, n_tasks, self.seed)
        if isinstance(self.engine, Factored):
            why = unknown or "several processes or sharded parameters have parts of them"
            self.log.tell_once(
                "formed",
                f"{type(self.engine).__name__}: task gradients are formed one by one, as with "
                f"Sequential, because {why}.",
            )
        return {}
