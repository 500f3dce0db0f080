"""Selectors: gates that come to rest on single experts."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from arch_zoo.gates import Gate

EPS = 1e-6  # keeps logarithm and reciprocal of a share finite


def smooth_step(t: Tensor, gamma: float = 1.0) -> Tensor:
    r"""Rise from 0 to 1 over ``[-gamma/2, gamma/2]`` as a cubic, flat outside.

    Source:
        Hazimeh et al., The Tree Ensemble Layer, ICML 2020, its smooth-step function.

    Example:
        >>> smooth_step(torch.tensor([-1.0, 0.0, 0.25, 0.5]))
        tensor([0.0000, 0.5000, 0.8438, 1.0000])
    """
    s = (t / gamma).clamp(-0.5, 0.5)
    return 0.5 + s * (1.5 - 2 * s.square())


class SelectorGate(nn.Module):
    r"""A mixture of `k` selectors, each of which picks one of `n` experts by its binary code.

    A selector has a logit per bit. What it gives to an expert is the product over the bits of
    ``smooth_step`` of the logit, or of the complement; codes of no expert get their part too. The
    first logit of a selector is the lowest bit of the code.

    Args:
        gate: What it reads and its depth.
        n: Number of experts.
        k: Number of selectors.
        gamma: Width of the step; positive.
        by_example: Read the logits off each example; else they are parameters.
        entropy_weight: Weight of the selectors' entropy, mean over the batch.
        leak_weight: Weight of :math:`\sum_i 1 / s_i - 1`, mean over the batch, where selector `i`
            gives :math:`s_i` to all experts together; no term if `n` is a power of two. A selector
            that has settled on a code of no expert has no gradient to leave it.
        normalise: ``"layer"`` puts a layer norm without parameters under logits that are read off
            an example; None, as published, does not.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> gate = SelectorGate(Gate(), 4, k=2, by_example=False)
        >>> weights, penalty = gate(torch.ones(1, 3))
        >>> bool(weights.sum().isclose(torch.tensor(1.0))), penalty
        (True, None)
    """

    def __init__(
        self,
        gate: Gate,
        n: int,
        *,
        k: int,
        gamma: float = 1.0,
        by_example: bool = True,
        entropy_weight: float = 0.0,
        leak_weight: float = 1.0,
        normalise: str | None = None,
    ) -> None:
        super().__init__()
        if normalise not in ("layer", None):
            raise ValueError(f"DSelectK: `normalise` must be 'layer' or None, got {normalise!r}.")
        if not 1 <= k <= n:
            raise ValueError(f"DSelectK: `k` must be between 1 and `num_experts` = {n}, got {k}.")
        if not gamma > 0:
            raise ValueError(f"DSelectK: `gamma` must be > 0, got {gamma}.")
        for name, weight in (("entropy_weight", entropy_weight), ("leak_weight", leak_weight)):
            if not weight >= 0:
                raise ValueError(f"DSelectK: `{name}` must be >= 0, got {weight}.")
        self.n, self.k, self.gamma = n, k, gamma
        self.bits = (n - 1).bit_length()
        self.entropy_weight = entropy_weight
        self.leak_weight = 0.0 if n == 2**self.bits else leak_weight
        self.normalise = normalise
        bound = gamma / 100
        self.layers = gate.layers(k * (self.bits + 1), bound) if by_example else None
        if not by_example:
            self.logits = nn.Parameter(torch.empty(k, self.bits + 1).uniform_(-bound, bound))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weights, shape ``[batch, n]``, and the weighted penalties, if there are any."""
        if self.layers is None:
            logits = self.logits
        else:
            u = functional.layer_norm(u, u.shape[-1:]) if self.normalise == "layer" else u
            logits = self.layers(u)
            logits = logits.unflatten(-1, (self.k, self.bits + 1))
        shares = self._shares(smooth_step(logits[..., :-1], self.gamma))
        weights = (torch.softmax(logits[..., -1:], dim=-2) * shares).sum(-2)
        if self.layers is None:
            weights = weights.expand(u.shape[0], self.n)
        return weights, self._penalty(shares)

    def _shares(self, bits: Tensor) -> Tensor:
        """Return what each selector gives to each expert, ``[..., k, bits]`` to ``[..., k, n]``."""
        shares = bits.new_ones(*bits.shape[:-1], 1)
        for bit in bits.unbind(-1):
            one = bit.unsqueeze(-1)
            shares = torch.cat([shares * (1 - one), shares * one], dim=-1)
        return shares[..., : self.n]

    def _penalty(self, shares: Tensor) -> Tensor | None:
        terms: list[Tensor] = []
        if self.entropy_weight:
            entropy = -(shares * (shares + EPS).log()).sum((-2, -1))
            terms.append(self.entropy_weight * entropy.mean())
        if self.leak_weight:
            leak = (1 / shares.sum(-1).clamp(min=EPS) - 1).sum(-1)
            terms.append(self.leak_weight * leak.mean())
        return sum(terms[1:], start=terms[0]) if terms else None
