"""The way of the data: from losses to ``.grad``, in one place."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradbal._utils.checks import OWNER
from gradbal._utils.dtensor import check_arrived, check_placed
from gradbal._utils.profiler import phase
from gradbal._utils.torch_private import post_accumulate_hooks
from gradbal.distributed import Processes
from gradbal.distributed.counts import Counts
from gradbal.graph.losses import Batch, Losses
from gradbal.graph.parameters import MODEL
from gradbal.jacobian.compute import Descent
from gradbal.rules._base import Closure, LossRule
from gradbal.solvers.gram import all_finite, outside_autocast
from gradbal.step.call import AuxLosses, Call
from gradbal.step.closures import probe
from gradbal.step.finite import Survey, survey_losses
from gradbal.step.gather import Gathered, check_peers, gather
from gradbal.step.learned import Learning
from gradbal.step.one_pass import explaining_passes, leaving_word, pass_once
from gradbal.step.options import Options
from gradbal.step.read import Reader
from gradbal.step.record import StepRecord
from gradbal.step.state import Core
from gradbal.step.weighting import Decision, Sight, decide, hold, reuse, select
from gradbal.step.write import add_to_grads, fill, replacing_grads

STRETCH = 1000  # steps after which the log says what made no difference
UNSOLVED = 1e-6  # residual of a solver above which the log says so


class Flow:
    """Go from losses to gradients.

    Holds what an optimizer needs while it runs and what is made anew after loading; all that is
    saved is in ``core``.

    Args:
        core: The rule and its state.
        options: The user's options.
        descent: Computes task gradients.
    """

    def __init__(self, core: Core, options: Options, descent: Descent) -> None:
        self.core, self.options, self.descent = core, options, descent
        self.planner = descent.planner
        self.learning = Learning(
            core, descent.roles.base, options.learned_lr, descent.planner.log.tell_once
        )
        self.reader = Reader(core, options, descent)
        self.last: StepRecord | None = None
        self.left_out = 0  # steps, also by a scaler
        self.reached = set[int]()  # parameters with a gradient after the last pass over all losses
        self.holds = False  # weights, for further evaluations of the losses in a step
        self.balanced = False  # whether losses came since the last step
        self.window: set[int] = set()  # tasks seen in the current stretch of steps
        self.n_steps = 0

    @property
    def processes(self) -> Processes:
        """Those that balance their losses together."""
        return self.descent.processes

    def shared_parameters(self) -> list[Tensor]:
        """Return the parameters that several tasks reach, as far as the steps have shown."""
        roles = self.descent.roles
        known = self.core.sets or self.planner.reached  # rules on losses keep no sets
        return [roles.params[number] for number in sorted(roles.shared(known))]

    @torch.inference_mode(False)  # what is kept would be unusable in an ordinary step
    @torch.no_grad()
    @outside_autocast
    def balance(self, losses: Losses, call: Call) -> bool:
        """Go from losses to ``.grad``; return whether there is something to step with."""
        core, options = self.core, self.options
        with leaving_word(lambda: self.processes), core.transaction() as undo:
            with phase("bookkeeping"):
                batch = self.reader.read(losses, call)
                if options.on_nonfinite == "absent":
                    batch = self._without_bad_losses(batch)
            if not batch.tasks:
                return self._skip(tuple(core.names), call, undo)
            scale = call.initial_gradient(batch.values.device)
            decision, shown = self._decide_on_losses(batch, call)
            if shown.bad and options.stops_at_nonfinite(call.scaler):
                return self._refuse("loss", shown.bad, batch.values, batch.tasks, call, undo)
            if decision is not None and (fault := self._fault(decision, batch.tasks)):
                return self._refuse_rule(fault, batch.tasks, call, undo)
            if decision is not None and decision.in_one_pass and not core.pending:
                return self._pass_once(batch, decision, shown, scale, call, undo)
            at_cut = decision is not None and not core.pending
            further = [] if decision is not None else self.reader.further(batch, call)
            with phase("jacobian"), explaining_passes():
                others = [more for more in further if isinstance(more, Batch)]
                found = gather(self.descent, core, batch, scale, call, others, at_cut=at_cut)
            if found is None:
                return False
            tasks = found.tasks
            with phase("gram"):
                seen = found.survey(scale, grams=decision is None, capturable=options.capturable)
            if seen.bad and self._leaves_out(seen.bad, call):
                seen = found.without(seen)
            if seen.bad and options.stops_at_nonfinite(call.scaler):
                return self._refuse(seen.what, seen.bad, batch.values, tasks, call, undo)
            with phase("solve"):
                decision = decision or self._decide(found, seen, scale, further)
                if fault := self._fault(decision, tasks):
                    return self._refuse_rule(fault, tasks, call, undo)
            with phase("write_grad"):
                finite = self._write(found, decision, call)
            if not finite:
                everyone = range(len(tasks))
                return self._refuse("gradient", everyone, batch.values, tasks, call, undo)
            with phase("bookkeeping"):
                self._commit(decision, tasks, seen, call)
            core.sets = found.known
            core.discard()
            if self.planner.chooser is not None:
                self.planner.chooser.stop()
            return True

    def _without_bad_losses(self, batch: Batch) -> Batch:
        """Leave tasks out whose losses are NaN or inf."""
        values = self.processes.sum(batch.values)
        bad = [i for i, value in enumerate(values.tolist()) if not math.isfinite(value)]
        return batch.without(bad) if bad else batch

    def _leaves_out(self, bad: Sequence[int], call: Call) -> bool:
        """Say whether tasks whose gradients are NaN or inf are left out of the step.

        Under a scaler the factor may be at fault, and an auxiliary loss (-1) is no task.
        """
        return self.options.on_nonfinite == "absent" and call.scaler is None and -1 not in bad

    def _decide_on_losses(self, batch: Batch, call: Call) -> tuple[Decision | None, Survey]:
        """Find weights that need no gradient, and look at the losses where that is enough."""
        core, options = self.core, self.options
        unseen = Survey({}, batch.values, None, [])
        if call.accumulate:
            return None, unseen
        due = options.capturable or core.age + 1 >= options.update_every
        reusable = call.replay or not due
        held = reuse(core, sorted({*batch.tasks, *core.pending.losses})) if reusable else None
        if call.replay and held is None:
            raise RuntimeError(
                f"{OWNER}: the closure returned losses of other tasks than in its first evaluation "
                "of this step; return those of the same tasks."
            )
        if core.pending or (held is None and not isinstance(core.rule, LossRule)):
            return held, unseen
        seen = survey_losses(
            batch.values,
            self.processes.beside(call.aux_batch),
            self.processes.sum,
            capturable=options.capturable,
        )
        stops = seen.bad and options.stops_at_nonfinite(call.scaler)
        if held is None and not stops:
            self.learning.show(batch.tasks, seen.losses)
            with phase("solve"):
                held = decide(core, options.policy, batch.tasks, {}, seen)
            held = self._selected(held, batch.tasks)
        return held, seen

    def _selected(self, decision: Decision, tasks: Sequence[int]) -> Decision:
        """Choose between new weights and held ones where that is done on the device."""
        if not self.options.capturable or self.options.update_every == 1:
            return decision
        return select(self.core, decision, tasks, self.options.update_every)

    def _decide(
        self,
        found: Gathered,
        seen: Survey,
        scale: Tensor | None,
        further: Sequence[Batch | Closure],
    ) -> Decision:
        """Ask the rule; a gradient that is not finite and is to pass gets plain weights."""
        gradients = found.gradients
        if seen.bad:
            ones = torch.ones_like(seen.losses)
            return Decision(dict.fromkeys(gradients.members, ones), reused=True)
        self.learning.show(found.tasks, seen.losses)
        sight = Sight(
            gradients.noise,
            gradients.rows,
            scale,
            gradients.n_batches,
            [None if isinstance(more, Batch) else more for more in further],
            partial(probe, self.core, found.tasks, self.descent.params),
            self.learning.lr,
            self.learning.base_lr,
            self.core.shards,
            self.processes,
        )
        decision = decide(
            self.core, self.options.policy, found.tasks, gradients.members, seen, sight
        )
        for group, (tasks, ctx) in decision.contexts.items():
            gram = decision.grams.get(group)
            squares = [] if gram is None or self.core.capturable else gram.diagonal().tolist()
            if 0.0 in squares:
                self._tell_about_zeros(tasks, squares)
            residual = 0.0 if self.core.capturable else float(ctx.stats.get("residual", 0.0))
            if not residual <= UNSOLVED:
                self.planner.log.tell_once(
                    "unsolved",
                    f"{type(self.core.rule).__name__}: the solver left a residual of "
                    f"{residual:.0e} in step {self.core.solved}: no weights satisfy all its "
                    "conditions, or it stopped early. The rule keeps its promises; "
                    "`last.stats` holds the residual of every step.",
                )
        return self._selected(decision, found.tasks)

    def _tell_about_zeros(self, tasks: Sequence[int], squares: Sequence[float]) -> None:
        """Tell which present tasks have a gradient that is exactly zero."""
        for task, square in zip(tasks, squares, strict=True):
            if square == 0:
                self.planner.log.tell_once(
                    f"zero {task}",
                    f"The gradient of task {self.core.names[task]!r} on the shared parameters is "
                    f"exactly zero in step {self.core.solved}, and some rules then hardly move; "
                    "if it has no labels in this batch, leave it out, or give None for its loss.",
                )

    def _write(self, found: Gathered, decision: Decision, call: Call) -> bool:
        """Write the direction, the heads' gradients and the auxiliary ones.

        Returns:
            Whether they are finite where nobody has looked yet: under a scaler, below a cut.
        """
        params = self.descent.params
        self._start_anew(call)
        with replacing_grads(params, fresh=call.fresh):
            grads, new = self.descent.direction(
                found.plan,
                found.gradients,
                *decision.placed(found.losses.device),
                decision.direction,
                retain_graph=call.retain_graph,
            )
            unseen = (
                call.scaler is not None and found.gradients.at_cut and not self.options.capturable
            )
            if unseen and not self.processes.all(all_finite(grads.values(), found.losses.device)):
                return False
            held, written = self.descent.roles.held, sorted({*grads, *found.aux})
            add_to_grads(params, held, grads, new)
            add_to_grads(params, held, found.aux)
        for hook, param in post_accumulate_hooks([params[number] for number in written]):
            hook(param)  # as torch does once the gradient is complete
        return True

    def _pass_once(
        self,
        batch: Batch,
        decision: Decision,
        seen: Survey,
        scale: Tensor | None,
        call: Call,
        undo: Callable[[], None],
    ) -> bool:
        """Take the weighted losses down in one ordinary pass."""
        planner, params = self.planner, self.descent.params
        if planner.is_new(batch):
            check_peers(planner.plan(batch, self.core.sets, found=True), self.processes.size)
        self._start_anew(call)
        weights = decision.shared[MODEL]
        fresh = call.fresh
        with phase("backward"), replacing_grads(params, fresh=fresh), explaining_passes():
            finite = pass_once(
                params,
                batch,
                weights,
                scale,
                call,
                self.processes,
                only_ours=not planner.hidden,
                capturable=self.options.capturable,
            )
            if call.fresh:
                self._check_hidden(batch)
            if self.core.shards:
                check_placed(params)
                found = [n for n, param in enumerate(params) if param.grad is not None]
                check_arrived(found, params)
        if isinstance(finite, Tensor) or finite:
            self._commit(decision, batch.tasks, seen, call, finite)
        else:  # the scaler will leave the step out
            undo()
        return True

    def _check_hidden(self, batch: Batch) -> None:
        """Raise if a parameter lost its gradient because a reentrant checkpoint hides it.

        A pass that writes the gradients of given parameters only does not reach these; the walk
        that would have found the checkpoint is left out where a graph looks like the last one.
        """
        params, planner = self.descent.params, self.planner
        reached = {n for n, param in enumerate(params) if param.grad is not None}
        lost, self.reached = self.reached - reached, reached
        if lost and not planner.hidden:
            planner.plan(batch, self.core.sets, found=True)
            if planner.hidden:
                raise RuntimeError(
                    f"{OWNER}: a reentrant checkpoint appeared in the graph after the first steps "
                    "and hides its parameters; nothing was changed. Compute the losses again and "
                    "repeat the step, or pass use_reentrant=False to torch's checkpoint."
                )

    def _watch(self, tasks: Sequence[int]) -> None:
        """Tell, every so many steps, what of a training makes no difference."""
        self.balanced = True
        self.window.update(tasks)
        self.n_steps += 1
        if self.n_steps % STRETCH:
            return
        core, tell = self.core, self.planner.log.tell_once
        for task in set(range(len(core.names))) - self.window:
            tell(
                f"unseen {task}",
                f"Task {core.names[task]!r} had no loss with a graph in {STRETCH:,} steps.",
            )
        if core.rule.by_epochs and not int(core.epoch):
            tell(
                "epochs",
                f"{type(core.rule).__name__} changes its weights at the end of an epoch only, and "
                f"there was none in {STRETCH:,} steps; call `end_epoch()` after each.",
            )
        self.window = set()

    def _start_anew(self, call: Call) -> None:
        """Forget what belonged to gradients that are gone."""
        started = call.fresh and not call.replay
        if started or all(param.grad is None for param in self.descent.params):
            self.core.forget_step()

    def _commit(
        self,
        decision: Decision,
        tasks: Sequence[int],
        seen: Survey,
        call: Call,
        finite: Tensor | bool = True,
    ) -> None:
        """Keep what the rule has changed, now that the gradients are written.

        With ``capturable`` it is kept where losses, inner products and weights are finite.
        """
        core = self.core
        if core.capturable:
            core.good = decision.all_finite(seen) & finite
        if not call.replay:
            decision.commit(core)
        if call.hold or self.options.update_every > 1:
            hold(core, decision, tasks)
        if core.rule.observes:
            core.decided = core.decided.union(tasks)
        self._watch(tasks)
        self.last = decision.record([core.names[task] for task in tasks], seen)

    def _refuse(
        self,
        what: str,
        bad: Sequence[int],
        losses: Tensor,
        tasks: Sequence[int],
        call: Call,
        undo: Callable[[], None],
    ) -> bool:
        """Deal with what is not finite: raise, skip the step, or let the scaler skip it."""
        names = tuple(self.core.names[task] for task in tasks)
        if call.scaler is None and self.options.when_nonfinite in ("raise", "absent"):
            whose = ", ".join("the auxiliary loss" if i < 0 else f"task {names[i]!r}" for i in bad)
            whose += self.processes.where(not losses.isfinite().all())
            so = "the step was broken off" if call.replay else "nothing was changed"
            raise ValueError(
                f"{OWNER}: the {what} of {whose} is not finite; {so}. Leave a task without labels "
                "in this batch out of the mapping, or give None for it; or pass "
                'on_nonfinite="absent" to leave such tasks out, "skip" to leave such steps out. '
                "torch.autograd.set_detect_anomaly(True) shows the cause."
            )
        return self._skip(names, call, undo)

    def _fault(self, decision: Decision, tasks: Sequence[int]) -> str:
        """Say what of a rule's answer is not finite; nothing if all is, or if that may pass."""
        if decision.reused or self.options.when_nonfinite == "propagate":
            return ""
        if bad := decision.bad_weights():
            whose = ", ".join(f"task {self.core.names[tasks[i]]!r}" for i in bad)
            return f"a weight for {whose} that is"
        if decision.direction is None:
            return ""
        parts = list(decision.direction.values())
        finite = not parts or all_finite(parts, parts[0].device)
        return "" if self.processes.all(finite) else "a direction that is"

    def _refuse_rule(
        self, fault: str, tasks: Sequence[int], call: Call, undo: Callable[[], None]
    ) -> bool:
        """Deal with a rule that returned NaN or inf for finite losses and gradients."""
        core = self.core
        if self.options.when_nonfinite in ("raise", "absent"):
            raise ValueError(
                f"{OWNER}: {type(core.rule).__name__} returned {fault} not finite in step "
                f"{core.solved}, although losses and task gradients are; nothing was changed. "
                "Check the options of the rule and the scale of the losses, or pass "
                'on_nonfinite="skip" to leave such steps out.'
            )
        return self._skip(tuple(core.names[task] for task in tasks), call, undo)

    def _skip(self, names: tuple[str, ...], call: Call, undo: Callable[[], None]) -> bool:
        """Leave a step out, or let the scaler do so; return whether the base may step."""
        undo()
        self.core.discard()
        self.core.forget_step()
        self.core.skipped += call.scaler is None
        self.left_out += 1
        self.last = StepRecord(names, torch.full((len(names),), torch.nan), skipped=True)
        fill(self.descent.params, None if call.scaler is None else torch.inf)
        return call.scaler is not None

    def tell_if_unbalanced(self) -> None:
        """Tell that a step without losses uses gradients which nobody has balanced."""
        if not self.balanced and any(param.grad is not None for param in self.descent.params):
            self.planner.log.tell_once(
                "unbalanced",
                "step() was called without losses after an ordinary backward pass, so nothing is "
                "balanced; call `step(losses)`, or `backward(losses)` before.",
            )
        self.balanced = False

    def tell_if_nothing_moves(self, result: object) -> None:
        """Tell that a closure returned a sum and wrote no gradient."""
        with_graph = isinstance(result, Tensor) and result.requires_grad
        if with_graph and all(param.grad is None for param in self.descent.params):
            self.planner.log.tell_once(
                "sum",
                "The closure returned one number and wrote no gradient, so nothing moves; return "
                "the losses as a list or mapping, or call `backward(losses)` in it.",
            )

    def evaluate(
        self,
        more: Sequence[Any],
        counts: Counts | None,
        losses: Losses,
        aux: AuxLosses | None,
        count: int,
    ) -> Tensor:
        """Write gradients for one of several evaluations in a step, all with the same weights."""
        self.options.check_more(self.core.rule, more, piecewise=False)
        if count == 1 and self.core.pending:
            raise RuntimeError(
                f"{OWNER}: gradients were put aside with `accumulate`, and a closure would "
                "evaluate a part of the batch only; call `backward` without `accumulate` and then "
                "`step()`."
            )
        if count > 1 and not self.holds:
            base = type(self.descent.roles.base).__name__
            raise RuntimeError(
                f"{OWNER}: {base} evaluates the losses several times "
                f"in a step, and {type(self.core.rule).__name__} with these options has no weights "
                "to hold meanwhile; choose a rule with weights, and one group."
            )
        again = {"hold": count == 1, "replay": count > 1}
        self.balance(losses, Call(aux, fresh=True, more=more, counts=counts, **again))
        self.holds = bool(self.core.held)
        return self.last.objective() if self.last is not None else torch.zeros(())
