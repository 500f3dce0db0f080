"""MTLOptimizer: from several losses to one step of any torch optimizer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradbal._utils.checks import OWNER
from gradbal.distributed.counts import Counts
from gradbal.graph.losses import Losses
from gradbal.graph.parameters import Groups, Parameters, Roles, tensors_of
from gradbal.jacobian.autotune import chooser_for
from gradbal.jacobian.compute import Descent
from gradbal.jacobian.engines import Auto, Engine, make_engine
from gradbal.jacobian.planner import Planner
from gradbal.optim.several import SeveralOptimizers
from gradbal.optim.wrapper import WrappedOptimizer, needs_closure
from gradbal.rules._base import Rule
from gradbal.rules._names import RuleName
from gradbal.rules._registry import make_rule
from gradbal.step.balance import Flow
from gradbal.step.call import AuxLosses, Call
from gradbal.step.check import check
from gradbal.step.closures import Evaluations
from gradbal.step.explain import explain
from gradbal.step.one_pass import explaining_passes
from gradbal.step.options import Options
from gradbal.step.record import StepRecord
from gradbal.step.state import Core


class MTLOptimizer(WrappedOptimizer):
    """Balance the gradients of several losses, then step any torch optimizer.

    ``mtl_opt.step(losses)`` takes the place of ``loss.backward(); optimizer.step()``. Which
    parameters the tasks share is found from the graph. To everything else (schedulers,
    ``GradScaler``, checkpoints, trainers) this is a torch optimizer; with clipping or scaling in
    between, use ``mtl_opt.backward(losses)`` and then ``mtl_opt.step()``.

    Args:
        optimizer: The base optimizer, or a list of optimizers that each step parameters of their
            own, such as Muon for matrices and AdamW for the rest.
        rule: Name of a rule or a rule object; ``gradbal.rule_names()`` lists the names.
        tasks: Names of the tasks or their number, to fix the size of the state beforehand.
        engine: ``"auto"``, another name or one of ``gradbal.jacobian.engines``.
        shared: Parameters, or modules, to treat as shared; None to find them.
        heads: Whether task-specific parameters get the ``"plain"`` gradient of their loss or one
            ``"weighted"`` by the rule; None for the rule's own way.
        scale: ``"sum"`` brings mean-like rules to the length of the summed loss' gradient, so that
            the learning rate carries over; ``"native"`` is as in the paper.
        groups: ``"model"`` for one decision, ``"tensor"`` for one per parameter tensor, or a
            mapping from names to parameters for one per name.
        update_every: Weights are solved every so many steps and reused in between.
        on_nonfinite: What happens to NaN or inf in losses or task gradients: ``"raise"``,
            ``"absent"`` to leave these tasks out of the step, ``"skip"`` the step, or
            ``"propagate"``; None for ``"raise"``, or ``"propagate"`` with ``capturable``. What a
            rule itself returns is an error but with the last two.
        learned_lr: Learning rate of what the rule learns; None for the rule's own, or else the
            live one of the first parameter group.
        capturable: Read nothing back from the device, and write what lasts in place, so that a
            step can be captured in a CUDA graph and replayed.
        process_group: Processes that balance their losses together, each with its part of the
            batch: ``"auto"`` for all there are, a group of ``torch.distributed``, or None for
            this process alone.
        seed: Seed of all randomness in the rule.
        gram_over: Parameters, or modules, over which inner products of task gradients are taken,
            such as the last shared block; None for all shared ones. The weights then are those of
            a smaller problem, and the tasks' passes end at the lowest of these; the direction is
            exact for all parameters.

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
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        rule: RuleName | str | Rule = "upgrad",
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
        gram_over: Parameters | None = None,
    ) -> None:
        if isinstance(optimizer, list | tuple):
            optimizer = SeveralOptimizers(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{OWNER}: expected a torch optimizer, got {type(optimizer).__name__}; build one "
                "first, such as torch.optim.AdamW(model.parameters())."
            )
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
            gram_over is not None,
        )
        self.options.check(rule, self.engine, optimizer)
        self.shared = None if shared is None else tensors_of(shared)
        self.gram_over = None if gram_over is None else tensors_of(gram_over)
        learner = "sgd" if isinstance(optimizer, torch.optim.SGD) else "adam"
        self.core = Core(rule, tasks=tasks, learner=learner, seed=seed, capturable=capturable)
        super().__init__(optimizer)

    # ------------------------------------------------------------------ what users call

    def backward(
        self,
        losses: Losses,
        *more: Losses | Callable[[], Any],
        aux: AuxLosses | None = None,
        accumulate: bool = False,
        scaler: Any = None,
        retain_graph: bool = False,
        counts: Counts | None = None,
    ) -> None:
        """Add the balanced gradient to ``.grad``, as ``loss.backward()`` adds the plain one.

        Args:
            losses: One per task: a list, a mapping from names, or a 1-D tensor. A task without a
                loss, or whose loss has no graph, is absent.
            *more: Losses of further independent batches, or closures that return them, for rules
                that take several.
            aux: A loss, or a mapping of losses, that is no task; its gradient is added after the
                rule.
            accumulate: Only put the task gradients aside; the next call without it balances the
                sum of all, as if it were one batch. Divide the losses by the number of pieces.
            scaler: A ``GradScaler``; give the losses as they are. The rule sees true gradients,
                ``.grad`` is left scaled for ``unscale_`` and ``scaler.step(mtl_opt)``.
            retain_graph: Keep the graph for another pass.
            counts: With several processes, the number of samples behind each loss in this one, as
                a mapping or a list; None if it is the same wherever there is a loss.

        Raises:
            TypeError: If the losses are no tensors.
            ValueError: If a loss is no scalar, the number of tasks changed, or a gradient is not
                finite; then nothing has changed.
        """
        self.options.check_more(self.core.rule, more, accumulate or bool(self.core.pending))
        call = Call(aux, accumulate, scaler, retain_graph, more=more, counts=counts)
        self._flow.balance(losses, call)

    def step(  # type: ignore[override]  # losses come where torch has the closure
        self,
        losses: Losses | Callable[[], Any] | None = None,
        *more: Losses | Callable[[], Any],
        closure: Callable[[], Any] | None = None,
        aux: AuxLosses | None = None,
        counts: Counts | None = None,
    ) -> Any:
        """Balance the losses and step; without losses, step with the gradients there are.

        Args:
            losses: As for ``backward``; their gradients replace those in ``.grad``. Or a closure.
            *more: As for ``backward``.
            closure: Evaluates the losses anew: for bases that need several evaluations, and for
                rules that look at the losses after the step. One that returns a scalar or None
                and calls ``backward`` itself goes to the base as it is.
            aux: As for ``backward``.
            counts: As for ``backward``.

        Returns:
            What the base optimizer returns: the value of the closure, if it had one.
        """
        if callable(losses):
            losses, closure = None, losses
        if losses is not None:
            self.options.check_more(self.core.rule, more, bool(self.core.pending))
        self.options.check_closure(
            self.core.rule, self.base, losses, closure, aux, needed=self._needs_closure
        )
        if losses is not None:
            if not self._flow.balance(losses, Call(aux, fresh=True, more=more, counts=counts)):
                return None
            result = self.base.step()
        elif closure is None:
            self._flow.tell_if_unbalanced()
            result = self.base.step()
        else:
            evaluate = partial(self._flow.evaluate, more, counts)
            evaluations = Evaluations(closure, evaluate, aux)
            with self._flow.reader.connect().telling(self.core):
                result = self.base.step(evaluations)
            if not evaluations.count:
                self._flow.tell_if_nothing_moves(result)
            closure = closure if evaluations.count else None
        self._flow.learning.after_step(closure, self._flow.processes)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, also those of what the rule learns."""
        super().zero_grad(set_to_none=set_to_none)
        self.core.forget_step()

    def discard(self) -> None:
        """Forget the task gradients put aside with ``accumulate=True``."""
        self.core.discard()

    def end_epoch(self, **options: Mapping[str, float] | Sequence[float]) -> None:
        """Mark the end of an epoch, for rules that average over epochs.

        Args:
            **options: New values of the rule's options with one number per task, by task name or
                in the order of the tasks: metrics of this epoch (``scores`` of PIVRG), or
                preferences that change.

        Raises:
            ValueError: If the rule has no such option, or there is not one number for each task.
            RuntimeError: If options are given before the first step.
        """
        with self.core.transaction():
            for option, values in options.items():
                self.core.renew(option, values)
            self.core.epoch = self.core.epoch + 1

    def check(self, losses: Losses) -> dict[str, float]:
        """Verify the engine's task gradients against lone passes; nothing changes.

        With several processes each does so for its own part of the batch, and it is verified that
        all have the same parameters, rule state and random generator; all must call it.

        Args:
            losses: As for ``backward``; their graph is kept.

        Returns:
            For each task the largest deviation, relative to its largest gradient entry.

        Raises:
            RuntimeError: If one deviates by more than rounding explains, or processes differ.
        """
        self._flow.reader.prove_alike()
        with self.core.transaction() as undo, explaining_passes():
            try:
                with self._flow.descent.apart() as descent:
                    return check(descent, self.core, self._flow.reader.read(losses))
            finally:
                undo()

    def explain(self, losses: Losses | None = None) -> str:
        """Say in words what is shared, where the cut is, and what a step costs.

        Args:
            losses: As for ``backward``, their graph is kept; None for what needs no graph.
        """
        with self.core.transaction() as undo:
            try:
                batch = None if losses is None else self._flow.reader.read(losses)
                return explain(self._flow.descent, self.core, batch)
            finally:
                undo()

    def metrics(self) -> dict[str, Tensor]:
        """Return the newest step as a flat dict of 0-dim tensors; nothing is read back."""
        metrics = {} if self.last is None else self.last.metrics()
        return {**metrics, "gradbal/skipped": torch.tensor(float(self.core.skipped))}

    def shared_parameters(self) -> list[Tensor]:
        """Return the parameters that the last step treated as shared by several tasks.

        Returns:
            In the order of the base optimizer's groups; empty before the first step.
        """
        return self._flow.shared_parameters()

    @property
    def last(self) -> StepRecord | None:
        """The newest step, or None before the first."""
        return self._flow.last

    @property
    def rule(self) -> Rule:
        """The rule, with its options."""
        rule: Rule = self.core.rule
        return rule

    def _init_runtime(self) -> None:
        super()._init_runtime()
        roles = Roles(
            self.base,
            self.shared,
            self.options.groups,
            self.gram_over,
            everything=self.core.rule.probes,
        )
        options = self.options
        chooser = chooser_for(
            self.core.rule, one_group=options.groups == "model", capturable=options.capturable
        )
        planner = Planner(
            roles,
            self.engine,
            chooser if isinstance(self.engine, Auto) else None,
            norms_only=self.core.rule.norms_only,
            reads=not self.options.capturable,
        )
        descent = Descent(planner)
        self._flow = Flow(self.core, self.options, descent)
        self._needs_closure = needs_closure(self.base)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew: storage, hooks and the record of what was said."""
        return {name: kept for name, kept in super().__getstate__().items() if name != "_flow"}

    def __repr__(self) -> str:
        parts = [repr(self.rule), f"engine={self.engine!r}", *self.options.changed()]
        return f"{type(self).__name__}({', '.join(parts)}, base={self.base!r})"
