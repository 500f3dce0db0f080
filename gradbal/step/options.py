"""What users pass to ``MTLOptimizer``, checked when it is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from gradbal._utils import checks
from gradbal._utils.checks import OWNER
from gradbal.graph.parameters import Groups
from gradbal.jacobian.engines import Engine, Representation, Sketched
from gradbal.optim.wrapper import WrappedOptimizer
from gradbal.rules._base import GradientRule, GramRule, LossRule, Rule
from gradbal.step.weighting import Policy


@dataclass(frozen=True)
class Options:
    """The options of ``MTLOptimizer``, as given."""

    scale: str = "sum"
    heads: str | None = None
    groups: Groups = "model"
    update_every: int = 1
    on_nonfinite: str | None = None
    learned_lr: float | None = None
    capturable: bool = False
    process_group: Any = "auto"
    seed: int = 0
    gram_over: bool = False

    def changed(self) -> list[str]:
        """Return the options that differ from their defaults, as they would be written."""
        pairs = ((field, getattr(self, field.name)) for field in fields(self))
        return [f"{field.name}={value!r}" for field, value in pairs if value != field.default]

    @property
    def when_nonfinite(self) -> str:
        """What happens to a non-finite gradient."""
        return self.on_nonfinite or ("propagate" if self.capturable else "raise")

    def stops_at_nonfinite(self, scaler: object) -> bool:
        """Whether a step with a non-finite gradient must not go on."""
        return scaler is not None or self.when_nonfinite != "propagate"

    @property
    def policy(self) -> Policy:
        """How weights are applied."""
        return Policy(self.scale, self.heads, self.capturable)

    def check(self, rule: Rule, engine: Engine, base: torch.optim.Optimizer) -> None:
        """Raise the sentence that says which option, or which two together, cannot be.

        Raises:
            ValueError: If one is not among its choices or two exclude each other.
        """
        self._check_values()
        if isinstance(base, WrappedOptimizer):
            raise TypeError(f"{OWNER}: the base is an {OWNER} already; wrap a plain optimizer.")
        if self.capturable and self.on_nonfinite in ("raise", "skip", "absent"):
            raise ValueError(
                f"{OWNER}: with `capturable` nothing is read back, so on_nonfinite="
                f"{self.on_nonfinite!r} cannot be; leave it out."
            )
        self._check_rule(rule, engine)
        if self.capturable and isinstance(engine, Sketched):
            raise ValueError(
                f"{OWNER}: Sketched draws anew in each step, which a captured one cannot; leave "
                "`capturable` out or choose another engine, such as Factored."
            )
        if self.capturable and rule.solver == "cvxpy":
            raise ValueError(
                f'{OWNER}: solver="cvxpy" runs on the host, so it cannot be captured; leave '
                "`capturable` or the solver out."
            )
        if not rule.weighted and isinstance(base, torch.optim.LBFGS):
            raise ValueError(
                f"{OWNER}: {type(rule).__name__} has no weights that LBFGS could hold while it "
                "evaluates the losses again; choose a rule with weights or another base optimizer."
            )

    def _check_values(self) -> None:
        """Raise if an option by itself cannot be."""
        checks.one_of(OWNER, ("sum", "native"), scale=self.scale)
        checks.one_of(OWNER, ("plain", "weighted", None), heads=self.heads)
        checks.one_of(
            OWNER, ("raise", "skip", "absent", "propagate", None), on_nonfinite=self.on_nonfinite
        )
        checks.of_type(OWNER, int, update_every=self.update_every, seed=self.seed)
        checks.at_least(OWNER, 1, update_every=self.update_every)
        if self.learned_lr is not None:
            checks.of_type(OWNER, float, learned_lr=self.learned_lr)
            checks.positive(OWNER, learned_lr=self.learned_lr)
        checks.one_of(OWNER, (True, False), capturable=self.capturable)
        if isinstance(self.process_group, str):
            checks.one_of(OWNER, ("auto", None), process_group=self.process_group)
        elif self.process_group is not None and not _is_group(self.process_group):
            raise TypeError(
                f'{OWNER}: `process_group` must be "auto", a group of torch.distributed or None, '
                f"got {self.process_group!r}."
            )
        if not isinstance(self.groups, Mapping):
            checks.one_of(OWNER, ("model", "tensor"), groups=self.groups)
        elif not self.groups:
            raise ValueError(f"{OWNER}: `groups` must name at least one group, got {{}}.")

    def _check_rule(self, rule: Rule, engine: Engine) -> None:
        name = type(rule).__name__
        elementwise = not rule.weighted
        refused = {
            "`update_every` > 1": elementwise and self.update_every > 1,
            '`heads="weighted"`': elementwise and self.heads == "weighted",
        }
        for what, refuse in refused.items():
            if refuse:
                raise ValueError(
                    f"{OWNER}: {name} works entry by entry and has no weights, so {what} cannot "
                    "be; choose a rule with weights or leave the option out."
                )
        if isinstance(rule, GradientRule):
            self._check_gradient_rule(rule, engine)
        if self.gram_over:
            self._check_gram_over(rule, engine)
        if self.groups != "model":
            self._check_groups(rule, engine)

    def _check_groups(self, rule: Rule, engine: Engine) -> None:
        name = type(rule).__name__
        if isinstance(rule, LossRule):
            raise ValueError(
                f"{OWNER}: {name} looks at the losses alone, so `groups` would change nothing; "
                "leave it out."
            )
        if (self.heads or rule.heads) != "plain":
            raise ValueError(
                f"{OWNER}: with `groups` a task has several weights and its head cannot take one; "
                'pass heads="plain".'
            )
        if self.update_every > 1:
            raise ValueError(
                f"{OWNER}: weights of several `groups` cannot be reused in one pass; "
                "leave out `update_every`."
            )
        if not engine.keeps:
            raise ValueError(
                f"{OWNER}: {type(engine).__name__} gives one Gram matrix, so `groups` needs "
                "another engine, such as Sequential."
            )

    def _check_gram_over(self, rule: Rule, engine: Engine) -> None:
        name = type(rule).__name__
        reasons = {
            f"{name} does not look at inner products of gradients": not isinstance(rule, GramRule),
            "a representation has its own inner products": isinstance(engine, Representation),
            "`groups` asks for other inner products": self.groups != "model",
        }
        for reason, refuse in reasons.items():
            if refuse:
                raise ValueError(f"{OWNER}: {reason}, so `gram_over` cannot be; leave it out.")

    def _check_gradient_rule(self, rule: GradientRule, engine: Engine) -> None:
        name, looks = type(rule).__name__, isinstance(engine, Representation)
        if not engine.keeps and not looks:
            raise ValueError(
                f"{OWNER}: {name} needs the gradients themselves, and {type(engine).__name__} keeps"
                " none; choose another engine, such as Sequential."
            )
        if looks and rule.buffers(torch.zeros(2, 1)):
            raise ValueError(
                f"{OWNER}: {name} keeps a gradient of every task from step to step, and those at a "
                "representation belong to the inputs of one batch; choose another engine, such as "
                "Sequential."
            )
        if rule.probes and (looks or self.groups != "model" or self.capturable):
            raise ValueError(
                f"{OWNER}: {name} looks at the losses at other parameters, all of them, so an "
                "engine for representations, `groups` and `capturable` cannot be; leave them out."
            )

    def check_more(self, rule: Rule, more: Sequence[object], piecewise: bool) -> None:
        """Raise if the losses come from more or fewer batches than the rule can take.

        Args:
            rule: The rule.
            more: The further batches.
            piecewise: Whether the first batch comes in pieces.
        """
        remedy = "leave the others out"
        if len(more) + 1 < min(rule.batches):
            closures = rule.probes
            what = "functions that return their losses" if closures else "their losses"
            remedy = f"pass {what} after those of the first"
        checks.batches(OWNER, rule, rule.batches, len(more) + 1, remedy)
        if more and piecewise:
            raise ValueError(
                f"{OWNER}: several batches cannot be accumulated in pieces; pass them whole."
            )

    def check_closure(
        self,
        rule: Rule,
        base: torch.optim.Optimizer,
        losses: object,
        closure: object,
        aux: object,
        *,
        needed: bool,
    ) -> None:
        """Raise if a closure is needed and none was given.

        Raises:
            TypeError: If the base evaluates the losses itself, or there are only auxiliary ones.
            RuntimeError: If the rule insists on the losses of the same batch after the step.
        """
        if losses is None and closure is None and aux is not None:
            raise TypeError(
                f"{OWNER}: `aux` goes with losses, got it alone; pass it where the losses are."
            )
        if needed and (losses is not None or closure is None):
            raise TypeError(
                f"{OWNER}: {type(base).__name__} evaluates the losses several times, so `step` "
                "needs a closure that returns them: `mtl_opt.step(lambda: losses(batch))`."
            )
        if losses is not None and closure is None and rule.after == "closure":
            raise RuntimeError(
                f'{type(rule).__name__}(after="closure"): `step` needs `closure=`, a function '
                "that returns the losses of the same batch again."
            )


def _is_group(given: object) -> bool:
    dist = torch.distributed
    if not dist.is_available():
        return False
    return isinstance(given, dist.ProcessGroup) or given == dist.GroupMember.NON_GROUP_MEMBER
