"""Transforms before a rule, which together are a rule."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradbal.checks import did_you_mean
from gradbal.registry import RULES, make_rule
from gradbal.rule import (
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
from gradbal.transforms import TRANSFORMS, Transform

PASSED_ON = ("scale", "heads", "per_task", "learned", "learner", "learned_lr", "after")


def chain(*links: str | Transform | Rule) -> Rule:
    """Put transforms before a rule.

    The first transform is the outermost: it is the first to see losses and gradients, and the
    last to change the weights.

    Args:
        *links: Transforms, by name with their default options or as objects of
            ``gradbal.transforms``, and at the end the rule, by name or as an object.

    Returns:
        A rule that looks at what its parts look at. Its ``claims`` are those of the rule with its
        default options that the transforms keep, and those that they add.

    Raises:
        ValueError: If a name is unknown, or if a transform cannot work on an elementwise rule.
        TypeError: If a link is of another type, or there is none.

    Example:
        >>> chain("log_losses", "mgda")
        GramChain(LogLosses(), MGDA(normalize='none', solver='exact'))
    """
    if not links:
        raise TypeError("chain: expected transforms and, at the end, a rule, got nothing.")
    rule = make_rule(links[-1])  # type: ignore[arg-type]  # it tells what is wrong
    transforms = tuple(_make_transform(link) for link in links[:-1])
    if isinstance(rule, Chain):
        transforms, rule = (*transforms, *rule.transforms), rule.rule
    if not transforms:
        return rule
    if isinstance(rule, GradientRule):
        _check_elementwise(transforms, rule)
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
            passed["norms_only"] = getattr(self.rule, "norms_only", True)
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
        own = {name: ctx.state[f"{position}.{name}"] for name in transform.init(ctx.losses)}
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
    """A chain on an elementwise rule."""

    rule: GradientRule

    def direction(
        self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context
    ) -> Sequence[Tensor] | Direction | Tensor | Weights:
        for transform in self.transforms:
            sizes = transform.sizes(torch.ones_like(ctx.losses), ctx)
            if sizes is not None:
                grads = [grad / _along(sizes, grad) for grad in grads]
            ctx = transform.see(ctx)
        return self.rule.direction(grads, indices, ctx)


def _along(sizes: Tensor, grad: Tensor) -> Tensor:
    """Return the sizes so shaped that they meet the rows of a gradient, ``[m, *shape]``."""
    return sizes.to(grad).reshape(-1, *[1] * (grad.ndim - 1))


def _make_transform(link: object) -> Transform:
    if isinstance(link, Transform):
        return link
    if not isinstance(link, str):
        raise TypeError(
            "chain: a transform must be a name or an object of `gradbal.transforms`, "
            f"got {link!r}; the rule comes last."
        )
    if link not in TRANSFORMS:
        raise ValueError(
            f"chain: unknown transform {link!r}.{did_you_mean(link, TRANSFORMS)} "
            f"Known: {', '.join(TRANSFORMS)}."
        )
    return TRANSFORMS[link]()


def _check_elementwise(transforms: Sequence[Transform], rule: Rule) -> None:
    for transform in transforms:
        if transform.needs_weights or transform.needs_norms:
            what = "weights to work on" if transform.needs_weights else "norms of whole gradients"
            raise ValueError(
                f"chain: {transform!r} needs {what}, and {type(rule).__name__} works entry by "
                "entry; choose a rule with weights or leave the transform out."
            )
