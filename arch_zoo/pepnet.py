"""PEPNet: embeddings scaled by domain, and towers scaled by user."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from arch_zoo.encoders import Encoder, module_of, parts_of
from arch_zoo.inputs import Inputs, call
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach


class GateUnit(nn.Module):
    r"""Factors for features: :math:`\gamma \, \sigma(W_2 \operatorname{relu}(W_1 u + b_1) + b_2)`.

    Args:
        width: Number of factors.
        hidden: Width in between; by default that of the factors.
        gamma: Largest factor.
        even: Start with the factor ``gamma / 2`` everywhere; else as linear layers start.

    Example:
        >>> GateUnit(2)(torch.ones(1, 3)).tolist()
        [[1.0, 1.0]]
    """

    def __init__(
        self, width: int, hidden: int | None = None, gamma: float = 2.0, even: bool = True
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.first = nn.LazyLinear(hidden or width)
        self.last = nn.Linear(hidden or width, width)
        if even:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, u: Tensor) -> Tensor:
        """Return factors ``[batch, width]`` between 0 and gamma."""
        return self.gamma * torch.sigmoid(self.last(torch.relu(self.first(u))))


class PEPNet(MultiTaskModel):
    r"""A network per task on one embedding, scaled by what is known of domain and user.

    EPNet scales the embedding `e` for the domain `s`, :math:`o = G([s; e]) \odot e`. PPNet scales
    each layer of a task's tower for the prior features `u`, :math:`h_t^{l+1} = G_t^l([u; o]) \odot
    \operatorname{relu}(W_t^l h_t^l + b_t^l)`. Gates see `e` and `o` without gradient. Call
    ``model(x, domain=..., prior=...)``.

    Args:
        encoder: From the batch to the embedding, ``[batch, width]``.
        heads: One module per task, from its tower's last layer to the output.
        width: Entries of the embedding.
        layers: Widths of the layers of every tower.
        domain: From the named input ``domain`` to features of it, such as an ``nn.Embedding``, or
            None for a network without EPNet.
        prior: From the named input ``prior`` to features of it, or None without PPNet.
        hidden: Hidden width of all gates; by default that of what they scale.
        gamma: Largest factor of a gate.
        even: Start gates at ``gamma / 2``; with a gamma of 2 the start is that of plain towers.
        dropout: After each layer.

    Raises:
        TypeError: If the encoder is none.
        ValueError: In a forward pass, if ``domain`` or ``prior`` is missing or of no use.

    Source:
        Chang et al., PEPNet: Parameter and Embedding Personalized Network, KDD 2023. The even start
        is ours.

    Example:
        >>> heads = {"click": nn.Linear(4, 1), "buy": nn.Linear(4, 1)}
        >>> domain, prior = nn.Embedding(3, 2), nn.Linear(5, 2)
        >>> model = PEPNet(nn.Linear(6, 8), heads, 8, [4], domain=domain, prior=prior)
        >>> ids, user = torch.tensor([0, 2]), torch.ones(2, 5)
        >>> model(torch.ones(2, 6), domain=ids, prior=user)["buy"].shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: Heads,
        width: int,
        layers: Sequence[int],
        *,
        domain: nn.Module | None = None,
        prior: nn.Module | None = None,
        hidden: int | None = None,
        gamma: float = 2.0,
        even: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(heads)
        self.encoder = module_of(self._owner, "encoder", encoder)
        self.domain, self.prior = domain, prior
        self.embedding_gate = None if domain is None else GateUnit(width, hidden, gamma, even)
        sizes = [width, *layers]
        self.dropout = nn.Dropout(dropout)

        def linears() -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))

        def gates() -> nn.ModuleList:
            return nn.ModuleList(GateUnit(size, hidden, gamma, even) for size in layers)

        self.towers = nn.ModuleDict({name: linears() for name in self.streams})
        named = self.streams if prior is not None else ()
        self.gates = nn.ModuleDict({name: gates() for name in named})

    def encode(
        self,
        x: Inputs = None,
        tasks: Sequence[str] | None = None,
        *,
        domain: Inputs = None,
        prior: Inputs = None,
        **named: Inputs,
    ) -> Features:
        """Compute what the heads read, as in :meth:`MultiTaskModel.encode`.

        Args:
            x: The batch.
            tasks: The tasks to compute.
            domain: What the module ``domain`` reads, such as ids ``[batch]``.
            prior: What the module ``prior`` reads.
            named: Further inputs by name, for the encoder and heads.

        Raises:
            ValueError: If ``domain`` or ``prior`` is missing or of no use.
        """
        for name, given, module in (("domain", domain, self.domain), ("prior", prior, self.prior)):
            if (given is None) != (module is None):
                must = "be passed to" if given is None else "be left out with"
                has = "with" if given is None else "without"
                raise ValueError(f"PEPNet: `{name}` must {must} a model {has} a `{name}` module.")
        return self.by_batch(self._encode, tasks, x, named, domain=domain, prior=prior)

    def reach(self) -> Reach:
        yield self.encoder, self.streams
        for module in (self.domain, self.prior, self.embedding_gate):
            if module is not None:
                yield module, self.streams
        for name in self.streams:
            yield self.towers[name], (name,)
            if name in self.gates:
                yield self.gates[name], (name,)

    def receivers(self) -> Iterator[nn.Module]:
        yield self.encoder

    def _encode(
        self, streams: tuple[str, ...], x: Inputs, domain: Any, prior: Any, **named: Inputs
    ) -> Features:
        e = call(self.encoder, x, named)
        if self.domain is not None and self.embedding_gate is not None:
            seen = torch.cat([self.domain(domain), e.detach()], dim=-1)
            e = self.embedding_gate(seen) * e
        u = None if self.prior is None else self.prior(prior)
        shared = (e,) if u is None else (e, u)
        per_task = {name: self._tower(name, e, u) for name in streams}
        return Features(shared=shared, per_task=per_task, aux={})

    def _tower(self, task: str, e: Tensor, prior: Tensor | None) -> Tensor:
        h = e
        seen = None if prior is None else torch.cat([prior, e.detach()], dim=-1)
        gates = [] if seen is None else parts_of(self.gates[task])
        for number, layer in enumerate(parts_of(self.towers[task])):
            h = torch.relu(layer(h))
            h = self.dropout(gates[number](seen) * h if gates else h)
        return h
