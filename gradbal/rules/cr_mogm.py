"""CR-MOGM: weights that are averaged over steps, for any rule with weights."""

from dataclasses import dataclass

from gradbal.rules._base import Claim, Rule, WeightRule
from gradbal.rules._chain import GramChain, chain
from gradbal.rules._registry import make_rule, register
from gradbal.rules.transforms import Smooth


@register(
    "cr_mogm",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.SIMPLEX],
    paper="Zhou et al., NeurIPS 2022",
    year=2022,
)
@dataclass(frozen=True, init=False, repr=False)
class CRMOGM(GramChain):
    r"""Correction-based stochastic multi-objective gradient manipulation.

    The weights of another rule are smoothed, :math:`\lambda_k = \alpha \lambda_{k-1} + (1 - \alpha)
    w_k`, so that they depend less on the noise of one batch: ``chain(Smooth(alpha=alpha), rule)``
    by its name in the literature.

    Args:
        rule: The other rule, by name or as an object; it must have weights.
        alpha: Share of the past, in [0, 1].

    Raises:
        ValueError: If the rule works entry by entry.

    Source:
        Zhou et al., NeurIPS 2022, algorithm 1, with a constant :math:`\alpha`.
    """

    def __init__(self, *, rule: str | Rule = "mgda", alpha: float = 0.9) -> None:
        smooth = Smooth(alpha=alpha)
        inner = chain(smooth, make_rule(rule))  # says what cannot be
        assert isinstance(inner, WeightRule)
        super().__init__((smooth,), make_rule(rule))

    def __repr__(self) -> str:
        smooth, *rest = self.transforms
        links = ", ".join(repr(part) for part in (*rest, self.rule))
        return f"CRMOGM({smooth!r}, {links})"
