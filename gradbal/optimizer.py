"""MTLOptimizer: from several losses to one step of any torch optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from gradbal import reports
from gradbal.arguments import OWNER, Groups, Options, Parameters, tensors_of
from gradbal.calls import AuxLosses, Call, fill, pass_once, replacing_grads
from gradbal.closures import Evaluations
from gradbal.core import Core
from gradbal.decision import MODEL, Decision, decide, hold, reuse
from gradbal.descent import Descent
from gradbal.engines import Engine, make_engine
from gradbal.gathering import Gathered, gather
from gradbal.grads import Writer
from gradbal.learning import Learning
from gradbal.losses import Batch, Losses, named_losses, read_batch
from gradbal.record import StepRecord
from gradbal.registry import make_rule
from gradbal.rule import LossRule, Rule
from gradbal.survey import Survey, survey_losses
from gradbal.wrapper import WrappedOptimizer


class MTLOptimizer(WrappedOptimizer):
    """Balance the gradients of several losses, then step any torch optimizer.

    ``mtl_opt.step(losses)`` takes the place of ``loss.backward(); optimizer.step()``. Which
    parameters the tasks share is found from the graph. To everything else (schedulers,
    ``GradScaler``, checkpoints, trainers) this is a torch optimizer; with clipping or scaling in
    between, use ``mtl_opt.backward(losses)`` and then ``mtl_opt.step()``.

    Args:
        optimizer: The base optimizer.
        rule: Name of a rule or a rule object; ``gradbal.rule_names()`` lists the names.
        tasks: Names of the tasks or their number, to fix the size of the state beforehand.
        engine: ``"auto"``, another name or one of ``gradbal.engines``.
        shared: Parameters, or modules, to treat as shared; None to find them.
        heads: Whether task-specific parameters get the ``"plain"`` gradient of their loss or one
            ``"weighted"`` by the rule; None for the rule's own way.
        scale: ``"sum"`` brings mean-like rules to the length of the summed loss' gradient, so that
            the learning rate carries over; ``"native"`` is as in the paper.
        groups: ``"model"`` for one decision, ``"tensor"`` for one per parameter tensor, or a
            mapping from names to parameters for one per name.
        update_every: Weights are solved every so many steps and reused in between.
        on_nonfinite: ``"raise"``, ``"skip"`` the step or ``"propagate"``; None for ``"raise"``, or
            ``"propagate"`` with ``capturable``.
        learned_lr: Learning rate of what the rule learns; None for the rule's own, or else the
            live one of the first parameter group.
        capturable: Read nothing back from the device, so that a step can be captured.
        process_group: ``"auto"``, or None to let every process decide for itself. Averaging over
            processes is not part of this release; a run with several processes says so.
        seed: Seed of all randomness in the rule.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is not among its choices, or two exclude each other.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> mtl_opt = MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), "upgrad")
        >>> mtl_opt.step(list(model(torch.ones(1, 2)).square().mean(dim=0)))
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: str | Rule = "upgrad",
        *,
        tasks: int | Sequence[str] | None = None,
        engine: str | Engine = "auto",
        shared: Parameters | None = None,
        heads: str | None = None,
        scale: str = "sum",
        groups: Groups = "model",
        update_every: int = 1,
        on_nonfinite: str | None = None,
        learned_lr: float | None = None,
        capturable: bool = False,
        process_group: Any = "auto",
        seed: int = 0,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{OWNER}: expected a torch optimizer, got {optimizer!r}.")
        rule, self.engine = make_rule(rule), make_engine(engine)
        self.options = Options(
            scale,
            heads,
            groups,
            update_every,
            on_nonfinite,
            learned_lr,
            capturable,
            process_group,
            seed,
        )
        self.options.check(rule, self.engine, optimizer)
        self.shared = None if shared is None else tensors_of(shared)
        learner = "sgd" if isinstance(optimizer, torch.optim.SGD) else "adam"
        self.core = Core(rule, tasks=tasks, learner=learner, seed=seed)
        self.last: StepRecord | None = None
        super().__init__(optimizer)

    # ------------------------------------------------------------------ what users call

    def backward(
        self,
        losses: Losses,
        *more: Losses,
        aux: AuxLosses | None = None,
        accumulate: bool = False,
        scaler: Any = None,
        retain_graph: bool = False,
    ) -> None:
        """Add the balanced gradient to ``.grad``, as ``loss.backward()`` adds the plain one.

        Args:
            losses: One per task: a list, a mapping from names, or a 1-D tensor. A task without a
                loss, or whose loss has no graph, is absent.
            *more: Losses of further independent batches, for rules that take several.
            aux: A loss, or a mapping of losses, that is no task; its gradient is added after the
                rule.
            accumulate: Only put the task gradients aside; the next call without it balances the
                sum of all, as if it were one batch. Divide the losses by the number of pieces.
            scaler: A ``GradScaler``; give the losses as they are. The rule sees true gradients,
                ``.grad`` is left scaled for ``unscale_`` and ``scaler.step(mtl_opt)``.
            retain_graph: Keep the graph for another pass.

        Raises:
            TypeError: If the losses are no tensors.
            ValueError: If a loss is no scalar, the number of tasks changed, or a gradient is not
                finite; then nothing has changed.
        """
        self.options.refuse_more(self.core.rule, more)
        self._balance(losses, Call(aux, accumulate, scaler, retain_graph))

    def step(  # type: ignore[override]  # losses come where torch has the closure
        self,
        losses: Losses | Callable[[], Any] | None = None,
        *more: Losses,
        closure: Callable[[], Any] | None = None,
        aux: AuxLosses | None = None,
    ) -> Any:
        """Balance the losses and step; without losses, step with the gradients there are.

        Args:
            losses: As for ``backward``; their gradients replace those in ``.grad``. Or a closure.
            *more: As for ``backward``.
            closure: Evaluates the losses anew: for bases that need several evaluations, and for
                rules that look at the losses after the step. One that returns a scalar or None
                and calls ``backward`` itself goes to the base as it is.
            aux: As for ``backward``.

        Returns:
            What the base optimizer returns: the value of the closure, if it had one.
        """
        self.options.refuse_more(self.core.rule, more)
        if callable(losses):
            losses, closure = None, losses
        self.options.check_closure(self.core.rule, self.base, losses, closure, aux)
        if losses is not None:
            if not self._balance(losses, Call(aux, fresh=True)):
                return None
            result = self.base.step()
        elif closure is None:
            result = self.base.step()
        else:
            evaluations = Evaluations(closure, self._evaluate, aux)
            result = self.base.step(evaluations)
            closure = closure if evaluations.count else None
        self._learning.after_step(closure)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, also those of what the rule learns."""
        super().zero_grad(set_to_none=set_to_none)
        self.core.forget_step()

    def discard(self) -> None:
        """Forget the task gradients put aside with ``accumulate=True``."""
        self.core.discard()

    def end_epoch(self) -> None:
        """Mark the end of an epoch, for rules that average over epochs."""
        self.core.epoch = self.core.epoch + 1

    def check(self, losses: Losses) -> dict[str, float]:
        """Verify the engine's task gradients against lone passes; nothing changes.

        Args:
            losses: As for ``backward``; their graph is kept.

        Returns:
            For each task the largest deviation, relative to its largest gradient entry.

        Raises:
            RuntimeError: If one deviates by more than rounding explains.
        """
        with self.core.transaction() as undo:
            try:
                return reports.check(self._descent, self.core, self._read(losses))
            finally:
                undo()

    def explain(self, losses: Losses | None = None) -> str:
        """Say in words what is shared, where the cut is, and what a step costs.

        Args:
            losses: As for ``backward``, their graph is kept; None for what needs no graph.
        """
        with self.core.transaction() as undo:
            try:
                batch = None if losses is None else self._read(losses)
                return reports.explain(self._descent, self.core, batch)
            finally:
                undo()

    def metrics(self) -> dict[str, Tensor]:
        """Return the newest step as a flat dict of 0-dim tensors; nothing is read back."""
        metrics = {} if self.last is None else self.last.metrics()
        return {**metrics, "gradbal/skipped": torch.tensor(float(self.core.skipped))}

    @property
    def rule(self) -> Rule:
        """The rule, with its options."""
        rule: Rule = self.core.rule
        return rule

    # ------------------------------------------------------------------ the flow

    @torch.no_grad()
    def _balance(self, losses: Losses, call: Call) -> bool:
        """Go from losses to ``.grad``; return whether there is something to step with."""
        core, options = self.core, self.options
        with core.transaction(random=not options.capturable) as undo:
            batch = self._read(losses)
            scale = call.initial_gradient(batch.values.device)
            decision, bad = self._decide_on_losses(batch, call)
            if bad:
                return self._refuse("loss", bad, batch.tasks, call, undo)
            if decision is not None and decision.in_one_pass and not core.rows:
                return self._pass_once(batch, decision, scale, call, undo)
            at_cut = decision is not None and not core.rows
            with record_function("gradbal::jacobian"):
                found = gather(self._descent, core, batch, scale, call, at_cut=at_cut)
            if found is None:
                return False
            with record_function("gradbal::gram"):
                seen = found.survey(scale, grams=decision is None, capturable=options.capturable)
            if seen.bad and options.stops_at_nonfinite(call.scaler):
                return self._refuse("gradient", seen.bad, found.tasks, call, undo)
            with record_function("gradbal::solve"):
                decision = decision or self._decide(found, seen, scale)
            with record_function("gradbal::write_grad"):
                self._write(found, decision, call)
            self._commit(decision, found.tasks, seen, call)
            core.sets = found.known
            core.discard()
            return True

    def _decide_on_losses(self, batch: Batch, call: Call) -> tuple[Decision | None, list[int]]:
        """Find weights that need no gradient, or the tasks whose losses forbid to go on."""
        core, options = self.core, self.options
        if call.accumulate:
            return None, []
        reusable = call.replay or core.age + 1 < options.update_every
        held = reuse(core, sorted({*batch.tasks, *core.losses})) if reusable else None
        if core.rows or (held is None and not isinstance(core.rule, LossRule)):
            return held, []
        aux = call.aux_batch()
        seen = survey_losses(
            batch.values, None if aux is None else aux.values, capturable=options.capturable
        )
        if seen.bad and options.stops_at_nonfinite(call.scaler):
            return None, seen.bad
        if held is None:
            self._learning.show(batch.tasks, seen.losses)
            held = decide(core, options.policy, batch.tasks, {}, seen)
        return held, []

    def _decide(self, found: Gathered, seen: Survey, scale: Tensor | None) -> Decision:
        """Ask the rule; a gradient that is not finite and is to pass gets plain weights."""
        gradients = found.gradients
        if seen.bad:
            ones = torch.ones_like(seen.losses)
            return Decision(dict.fromkeys(gradients.members, ones), reused=True)
        self._learning.show(found.tasks, seen.losses)
        return decide(
            self.core,
            self.options.policy,
            found.tasks,
            gradients.members,
            seen,
            gradients.eps,
            gradients.rows,
            scale,
        )

    def _write(self, found: Gathered, decision: Decision, call: Call) -> None:
        """Write the direction, the heads' gradients and the auxiliary ones."""
        params = self._descent.params
        self._start_anew(call)
        with replacing_grads(params, fresh=call.fresh):
            grads = self._descent.direction(
                found.plan, found.gradients, decision, retain_graph=call.retain_graph
            )
            self._writer.add(params, grads, self._descent.keep.buffers())
            self._writer.add(params, found.aux, {})

    def _pass_once(
        self,
        batch: Batch,
        decision: Decision,
        scale: Tensor | None,
        call: Call,
        undo: Callable[[], None],
    ) -> bool:
        """Take the weighted losses down in one ordinary pass."""
        descent = self._descent
        if not descent.seen:  # the only time that the graph is walked
            descent.plan(batch, self.core.sets, found=True)
        self._start_anew(call)
        weights = decision.shared[MODEL]
        with replacing_grads(descent.params, fresh=call.fresh):
            finite = pass_once(descent.params, batch, weights, scale, call)
        if finite:
            self._commit(decision, batch.tasks, Survey({}, batch.values, None, []), call)
        else:  # the scaler will leave the step out
            undo()
        return True

    def _start_anew(self, call: Call) -> None:
        """Forget what belonged to gradients that are gone."""
        gone = all(param.grad is None for param in self._descent.params)
        if (call.fresh and not call.replay) or gone:
            self.core.forget_step()

    def _commit(self, decision: Decision, tasks: Sequence[int], seen: Survey, call: Call) -> None:
        """Keep what the rule has changed, now that the gradients are written."""
        core = self.core
        if not call.replay:
            decision.commit(core)
        if call.hold or self.options.update_every > 1:
            hold(core, decision, tasks)
        if core.rule.observes:
            core.decided = core.decided.union(tasks)
        self.last = decision.record([core.names[task] for task in tasks], seen)

    def _refuse(
        self,
        what: str,
        bad: Sequence[int],
        tasks: Sequence[int],
        call: Call,
        undo: Callable[[], None],
    ) -> bool:
        """Deal with what is not finite: raise, skip the step, or let the scaler skip it."""
        names = tuple(self.core.names[task] for task in tasks)
        if call.scaler is None and self.options.when_nonfinite == "raise":
            whose = ", ".join("the auxiliary loss" if i < 0 else f"task {names[i]!r}" for i in bad)
            raise ValueError(
                f"{OWNER}: the {what} of {whose} is not finite; nothing was changed. Look for the "
                'cause with torch.autograd.set_detect_anomaly(True), or pass on_nonfinite="skip" '
                "to leave such steps out."
            )
        undo()
        self.core.discard()
        self.core.forget_step()
        self.core.skipped += call.scaler is None
        self.last = StepRecord(names, torch.full((len(names),), torch.nan), skipped=True)
        fill(self._descent.params, None if call.scaler is None else torch.inf)
        return call.scaler is not None

    # ------------------------------------------------------------------ around the flow

    def _read(self, losses: Losses) -> Batch:
        """Bring the losses into one form and give each task its number."""
        self.options.check_processes()
        self._descent.refresh()
        names, found = named_losses(losses)
        batch = read_batch(found, self.core.number_tasks(names, len(found)))
        if not batch.tasks:
            raise ValueError(
                "Losses: no loss has a graph, so there is nothing to differentiate; compute at "
                "least one from parameters that require gradients."
            )
        return batch

    def _evaluate(self, losses: Losses, aux: AuxLosses | None, count: int) -> Tensor:
        """Write gradients for one of several evaluations in a step, all with the same weights."""
        if count > 1 and not self.core.held:
            raise RuntimeError(
                f"{OWNER}: {type(self.base).__name__} evaluates the losses several times in a "
                f"step, and {type(self.core.rule).__name__} with these options has no weights to "
                "hold meanwhile; choose a rule with weights, and one group."
            )
        self._balance(losses, Call(aux, fresh=True, hold=count == 1, replay=count > 1))
        return self.last.objective() if self.last is not None else torch.zeros(())

    def _init_runtime(self) -> None:
        super()._init_runtime()
        norms_only = getattr(self.core.rule, "norms_only", False)
        self._descent = Descent(
            self.base, self.engine, self.shared, self.options.groups, norms_only=norms_only
        )
        self._writer = Writer()
        tell_once, lr = self._descent.tell_once, self.options.learned_lr
        self._learning = Learning(self.core, self.base, lr, tell_once)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew: storage, hooks and the record of what was said."""
        kept = super().__getstate__().items()
        anew = ("_descent", "_writer", "_learning")
        return {name: value for name, value in kept if name not in anew}
