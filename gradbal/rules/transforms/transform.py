"""The contract of a transform: what stands between the task gradients and a rule."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from gradbal.rules._base import Claim, Context, State


class Transform:
    """Changes what a rule sees, or the weights it returns; by default nothing.

    Attributes:
        needs_losses: Whether the transform looks at the losses.
        needs_norms: Whether it looks at the norms of the task gradients.
        needs_weights: Whether it works on weights, which elementwise rules do not have.
        tracks: Whether it replaces the task gradients by others of the same shape.
        on_heads: Whether heads, too, get their gradients divided by :meth:`sizes`, because it is
            the loss itself that is transformed.
    """

    needs_losses: bool = False
    needs_norms: bool = False
    needs_weights: ClassVar[bool] = False
    tracks: ClassVar[bool] = False
    on_heads: ClassVar[bool] = False

    def init(self, losses: Tensor) -> State:
        """Make every tensor that the transform keeps, as :meth:`gradbal.Rule.init` does."""
        return {}

    def buffers(self, rows: Tensor) -> State:
        """Make what is kept for one parameter, as ``GradientRule.buffers`` does."""
        return {}

    def track(
        self, rows: Sequence[Tensor], kept: Sequence[State], state: State
    ) -> Sequence[Tensor]:
        """Return other task gradients.

        Args:
            rows: One tensor of shape ``[m, *shape]`` per parameter.
            kept: The transform's own tensors for each, whose entries it may rebind.
            state: Its other tensors, too.
        """
        return rows

    def see(self, ctx: Context) -> Context:
        """Return the context that the rule gets; ``ctx`` itself is not changed."""
        return ctx

    def sizes(self, norms: Tensor, ctx: Context) -> Tensor | None:
        """Return what each task gradient is divided by, shape ``[m]``; None for nothing.

        Args:
            norms: Norms of the task gradients, shape ``[m]``; ones unless ``needs_norms``.
            ctx: What else is known, before :meth:`see`.
        """
        return None

    def finish(self, weights: Tensor, state: State) -> Tensor:
        """Return other weights than the rule's, shape ``[m]``.

        Args:
            weights: Those of the rule.
            state: The transform's own tensors, whose entries it may rebind.
        """
        return weights

    def keep(self, claims: frozenset[Claim]) -> frozenset[Claim]:
        """Return what a rule still promises, and what it now promises, behind this transform."""
        raise NotImplementedError
