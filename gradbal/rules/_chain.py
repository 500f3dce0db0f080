"""Transforms before a rule, which together are a rule."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradbal._utils.checks import did_you_mean
from gradbal.rules._base import (
    Claim,
    Context,
    Direction,
    GradientRule,
    GramRule,
    LossRule,
    Rule,
    State,
    WeightRule,
    Weights,
)
from gradbal.rules._registry import RULES, make_rule
from gradbal.rules.transforms import TRANSFORMS, Transform
from gradbal.solvers.gram import combined, times

PASSED_ON = (
    *("scale", "heads", "per_task", "learned", "learner", "learned_lr", "after"),
    *("sees_absent", "by_epochs"),
)


def chain(*links: str | Transform | Rule) -> Rule:
    """Put transforms before a rule.

    The first transform is the outermost: it is the first to see losses and gradients, and the
    last to change the weights.

    Args:
        *links: Transforms, by name with their default options or as objects of
            ``gradbal.rules.transforms``, and at the end the rule, by name or as an object.

    Returns:
        A rule that looks at what its parts look at. Its ``claims`` are those of the rule with its
        default options that the transforms keep, and those that they add.

    Raises:
        ValueError: If a name is unknown, a transform finds no weights to work on, or the rule
            needs several batches.
        TypeError: If a link is of another type, or there is none.

    Example:
        >>> chain("log_losses", "mgda")
        GramChain(LogLosses(), MGDA(normalize='none', solver='exact'))
    """
    if not links:
        raise TypeError("chain: expected transforms and, at the end, a rule, got nothing.")
    if links[-1] in TRANSFORMS or isinstance(links[-1], Transform):
        raise ValueError(
            f"chain: {links[-1]!r} is a transform, and the rule comes last; change their order."
        )
    rule = make_rule(links[-1])
    transforms = tuple(_make_transform(link) for link in links[:-1])
    if isinstance(rule, Chain):
        transforms, rule = (*transforms, *rule.transforms), rule.rule
    if not transforms:
        return rule
    if min(rule.batches) > 1:
        raise ValueError(
            f"chain: {type(rule).__name__} looks at several batches, and a transform knows the "
            "losses of the first alone; use the rule without transforms."
        )
    if isinstance(rule, GradientRule) or any(t.tracks for t in transforms):
        _check_weights(transforms, rule)
        return GradientChain(transforms, rule)
    if isinstance(rule, LossRule) and not any(t.needs_norms for t in transforms):
        return LossChain(transforms, rule)
    return GramChain(transforms, rule)


@dataclass(frozen=True, repr=False)
class Chain(Rule):
    """A rule behind transforms; made by :func:`chain`.

    The tensors of the rule keep their names in the state, those of a transform get its position
    in front, so everything that is said about a rule's tensors holds for the chain's.

    Attributes:
        transforms: Outermost first.
        rule: What they stand before.
    """

    transforms: tuple[Transform, ...]
    rule: Rule

    def __post_init__(self) -> None:
        passed = {name: getattr(self.rule, name) for name in (*PASSED_ON, *self.rule.per_task)}
        parts: tuple[Transform | Rule, ...] = (*self.transforms, self.rule)
        passed["needs_losses"] = any(part.needs_losses for part in parts)
        if isinstance(self, GramRule):
            passed["norms_only"] = self.rule.norms_only
        if isinstance(self, GradientRule):
            passed["weighted"] = self.rule.weighted and not any(
                transform.tracks for transform in self.transforms
            )
        for name, value in passed.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        parts = ", ".join(repr(part) for part in (*self.transforms, self.rule))
        return f"{type(self).__name__}({parts})"

    @property
    def kind(self) -> str:
        parts = (type(self), *map(type, self.transforms))
        return " of ".join([*(part.__name__ for part in parts), self.rule.kind])

    @property
    def claims(self) -> frozenset[Claim]:
        """What the chain promises."""
        entries = (entry for entry in RULES.values() if entry.rule is type(self.rule))
        claims: frozenset[Claim] = next((entry.claims for entry in entries), frozenset())
        for transform in reversed(self.transforms):
            claims = transform.keep(claims)
        return claims

    @property
    def observes(self) -> bool:
        return self.rule.observes

    def init(self, losses: Tensor) -> State:
        state = self.rule.init(losses)
        for position, transform in enumerate(self.transforms):
            own = transform.init(losses)
            state |= {f"{position}.{name}": tensor for name, tensor in own.items()}
        return state

    def proximal(self, name: str, value: Tensor, slope: Tensor, lr: float | Tensor) -> Tensor:
        return self.rule.proximal(name, value, slope, lr)

    def observe(self, losses: Tensor, ctx: Context) -> None:
        for transform in self.transforms:
            ctx = transform.see(ctx)
        self.rule.observe(ctx.losses, ctx)


class _WeightChain(Chain, WeightRule):
    """A chain on a rule with weights."""

    rule: WeightRule

    def weights(self, signal: Tensor, ctx: Context) -> Tensor | Weights:
        return self._ask(0, signal if isinstance(self, GramRule) else None, ctx)

    def _ask(self, position: int, gram: Tensor | None, ctx: Context) -> Tensor | Weights:
        """Walk in through the transforms from this one on, ask the rule, and walk out."""
        if position == len(self.transforms):
            return self._ask_rule(gram, ctx)
        transform = self.transforms[position]
        norms = torch.ones_like(ctx.losses) if gram is None else gram.diagonal().sqrt()
        sizes = transform.sizes(norms, ctx)
        if gram is not None and sizes is not None:
            gram = gram / sizes / sizes[:, None]
        result = self._ask(position + 1, gram, transform.see(ctx))
        shared, heads = result if isinstance(result, Weights) else (result, None)
        own = _named(ctx.state, f"{position}.")
        shared = transform.finish(shared, own)
        ctx.state.update({f"{position}.{name}": tensor for name, tensor in own.items()})
        if sizes is not None:
            shared = shared / sizes
            if heads is not None and (transform.on_heads or self.heads == "weighted"):
                heads = heads / sizes
        return shared if heads is None else Weights(shared, heads)

    def _ask_rule(self, gram: Tensor | None, ctx: Context) -> Tensor | Weights:
        signal = ctx.losses if gram is None or isinstance(self.rule, LossRule) else gram
        result = self.rule.weights(signal, ctx)
        changed = any(transform.on_heads for transform in self.transforms)
        if changed and self.heads == "plain" and not isinstance(result, Weights):
            return Weights(result, torch.ones_like(result))
        return result


class LossChain(_WeightChain, LossRule):
    """A chain that looks at the losses alone."""


class GramChain(_WeightChain, GramRule):
    """A chain that looks at inner products."""


class GradientChain(Chain, GradientRule):
    """A chain that works on the task gradients themselves."""

    def buffers(self, rows: Tensor) -> State:
        found = self.rule.buffers(rows) if isinstance(self.rule, GradientRule) else {}
        for position, transform in enumerate(self.transforms):
            own = transform.buffers(rows)
            found |= {f"{position}.{name}": tensor for name, tensor in own.items()}
        return found

    def direction(
        self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context
    ) -> Sequence[Tensor] | Direction | Tensor | Weights:
        shared, heads = self._ask(0, grads, indices, ctx)
        if heads is None:
            return shared
        return Weights(shared, heads) if isinstance(shared, Tensor) else Direction(shared, heads)

    def _ask(
        self, position: int, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context
    ) -> tuple[Tensor | Sequence[Tensor], Tensor | None]:
        """Walk in through the transforms from this one on, ask the rule, and walk out."""
        if position == len(self.transforms):
            return self._ask_rule(grads, indices, ctx)
        transform, prefix = self.transforms[position], f"{position}."
        norms = torch.ones_like(ctx.losses)
        if transform.needs_norms:
            norms = ctx.gram(grads).diagonal().sqrt()
        sizes = transform.sizes(norms, ctx)
        if sizes is not None:
            grads = times(grads, 1 / sizes)
        state = _named(ctx.state, prefix)
        kept = [_named(tensors, prefix) for tensors in ctx.buffers]
        grads = transform.track(grads, kept, state)
        inner = transform.see(ctx)
        shared, heads = self._ask(position + 1, grads, indices, inner)
        ctx.buffers = [
            {**tensors, **{prefix + name: tensor for name, tensor in own.items()}}
            for tensors, own in zip(inner.buffers, kept, strict=True)
        ]
        if isinstance(shared, Tensor):
            shared = transform.finish(shared, state)
            if transform.tracks:
                shared = combined(shared, grads)
            elif sizes is not None:
                shared = shared / sizes
        ctx.state.update({prefix + name: tensor for name, tensor in state.items()})
        with_heads = transform.on_heads or self.heads == "weighted"
        if heads is not None and sizes is not None and with_heads:
            heads = heads / sizes
        return shared, heads

    def _ask_rule(
        self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context
    ) -> tuple[Tensor | Sequence[Tensor], Tensor | None]:
        rule = self.rule
        result: Sequence[Tensor] | Direction | Tensor | Weights
        if isinstance(rule, GradientRule):
            result = rule.direction(grads, indices, ctx)
        elif isinstance(rule, WeightRule):
            result = rule.weights(
                ctx.losses if isinstance(rule, LossRule) else ctx.gram(grads), ctx
            )
        if isinstance(result, Weights | Direction):
            return result.shared, result.heads
        heads = None
        if self.heads == "weighted" and isinstance(result, Tensor):
            heads = result
        elif any(transform.on_heads for transform in self.transforms):
            heads = torch.ones_like(ctx.losses)
        return result, heads


def _named(tensors: State, prefix: str) -> State:
    """Return the tensors whose name begins so, by the rest of their names."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _make_transform(link: object) -> Transform:
    if isinstance(link, Transform):
        return link
    if not isinstance(link, str):
        raise TypeError(
            "chain: a transform must be a name or an object of `gradbal.rules.transforms`, "
            f"got {link!r}; the rule comes last."
        )
    if link not in TRANSFORMS:
        raise ValueError(
            f"chain: unknown transform {link!r}.{did_you_mean(link, TRANSFORMS)} "
            f"Known: {', '.join(TRANSFORMS)}."
        )
    return TRANSFORMS[link]()


def _check_weights(transforms: Sequence[Transform], rule: Rule) -> None:
    """Raise if a transform that works on weights stands where there is a direction instead."""
    behind: object = None if rule.weighted else rule
    for transform in reversed(transforms):
        if transform.needs_weights and behind is not None:
            raise ValueError(
                f"chain: {transform!r} needs weights to work on, and {type(behind).__name__} "
                "behind it makes a direction entry by entry; change their order or leave one out."
            )
        if transform.tracks:
            behind = transform
