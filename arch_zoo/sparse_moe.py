"""Sparse mixtures of experts for tokens, and a model whose blocks route by task."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arch_zoo.encoders import Encoder, Factory, module_of, parts_of, stages_of
from arch_zoo.inputs import Inputs, call, takes
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach


class SparseMoE(nn.Module):
    r"""A feed-forward layer of which every token uses `k` experts out of `n`.

    A router gives each token probabilities :math:`p = \operatorname{softmax}(R x)` in float32, and
    the token gets :math:`\sum_e g_e f_e(x)` over its `k` likeliest experts, with :math:`g = p` or,
    normalised, with shares of these that sum to one. No token is dropped.

    The balance loss is :math:`\tfrac{n}{k} \sum_e f_e P_e` with the share :math:`f_e` of tokens
    that chose an expert and its mean probability :math:`P_e`: 1 if all are used alike,
    :math:`n / k` at the most. The z-loss is the mean of :math:`\log^2 \sum_e \exp (R x)_e`.

    Args:
        expert: A factory of experts, from ``[tokens, width]`` to a width of their own.
        width: Width of the tokens.
        n: Number of experts.
        k: Experts per token.
        tasks: Tasks with a router each; by default all use one router.
        normalise: Let the weights of the chosen experts sum to one. With `k` of 1 the router would
            have no gradient, which is an error.
        balance_weight: Weight of the balance loss.
        z_weight: Weight of the z-loss.

    Raises:
        TypeError: If the expert is no factory.
        ValueError: If a number is out of range.

    Source:
        Shazeer et al., ICLR 2017; Fedus et al., Switch Transformers, 2021, the balance loss divided
        by `k`; Liang et al., M³ViT, NeurIPS 2022, the routers per task; Zoph et al., ST-MoE, 2022,
        the z-loss.

    Example:
        >>> layer = SparseMoE(lambda: nn.Linear(4, 4), 4, n=3, k=2)
        >>> y, aux = layer(torch.ones(2, 5, 4))
        >>> tuple(y.shape), sorted(aux)
        ((2, 5, 4), ['balance'])
    """

    def __init__(
        self,
        expert: Factory,
        width: int,
        *,
        n: int,
        k: int,
        tasks: Sequence[str] = (),
        normalise: bool | None = None,
        balance_weight: float = 0.01,
        z_weight: float = 0.0,
    ) -> None:
        super().__init__()
        normalise = k > 1 if normalise is None else normalise
        if not 1 <= k <= n or (normalise and k == 1 and n > 1):
            raise ValueError(
                f"SparseMoE: `k` must be between 1 and `n` = {n}, and above 1 where weights are "
                f"normalised, got {k}."
            )
        if isinstance(expert, nn.Module):
            raise TypeError(
                "SparseMoE: `expert` must be a factory, which makes each expert anew, got "
                f"{type(expert).__name__}."
            )
        self.n, self.k, self.normalise = n, k, normalise
        self.balance_weight, self.z_weight = balance_weight, z_weight
        self.experts = nn.ModuleList(module_of("SparseMoE", "expert", expert) for _ in range(n))
        names = tasks or ("all",)
        self.routers = nn.ModuleDict({name: nn.Linear(width, n, bias=False) for name in names})
        self.by_task = bool(tasks)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, task: str | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return features and the weighted auxiliary losses.

        Args:
            x: Tokens, ``[..., width]``.
            attention_mask: Which tokens count, ``[...]``; the others become zero and count nowhere.
            task: Whose router to use, where each has one.

        Raises:
            ValueError: If a task is needed or not known.
        """
        name = (task or "") if self.by_task else "all"
        if name not in self.routers:
            known = ", ".join(map(repr, self.routers))
            raise ValueError(f"SparseMoE: `task` must be among {known}, got {task!r}.")
        tokens = x.reshape(-1, x.shape[-1])
        counted = tokens.new_ones(tokens.shape[0]) if attention_mask is None else attention_mask
        counted = (counted.reshape(-1) != 0).float()
        with torch.autocast(x.device.type, enabled=False):
            weight = self.routers[name].get_parameter("weight").float()
            logits = nn.functional.linear(tokens.float(), weight)
        shares = torch.softmax(logits, dim=-1)
        chosen = shares.topk(self.k, dim=-1).indices
        picked = torch.zeros_like(shares).scatter(1, chosen, 1.0) * counted.unsqueeze(1)
        weights = shares * picked
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo().tiny)
        y = self._mixed(tokens, weights.to(x.dtype), picked)
        return y.reshape(*x.shape[:-1], -1), self._losses(logits, shares, picked, counted)

    def _mixed(self, tokens: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        """Run each expert on its tokens; in a graph, whose shapes are fixed, on all."""
        experts = parts_of(self.experts)
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            outputs = torch.stack([expert(tokens) for expert in experts], dim=1)
            dense: Tensor = torch.einsum("te,te...->t...", weights, outputs)
            return dense
        # an expert without tokens runs on none, so that its gradient is zero and not absent
        rows = [column.nonzero().squeeze(1) for column in picked.unbind(1)]
        parts = [
            weights[row, number].unsqueeze(1) * expert(tokens[row])
            for number, (expert, row) in enumerate(zip(experts, rows, strict=True))
        ]
        total = parts[0].new_zeros(tokens.shape[0], parts[0].shape[-1])
        summed: Tensor = total.index_add(0, torch.cat(rows), torch.cat(parts))
        return summed

    def _losses(
        self, logits: Tensor, shares: Tensor, picked: Tensor, counted: Tensor
    ) -> dict[str, Tensor]:
        count = counted.sum().clamp(min=1)
        used = picked.sum(0) / count
        mean = (shares * counted.unsqueeze(1)).sum(0) / count
        squares = logits.logsumexp(-1).square()
        losses = {
            "balance": self.balance_weight * self.n / self.k * (used * mean).sum(),
            "z": self.z_weight * (squares * counted).sum() / count,
        }
        weights = {"balance": self.balance_weight, "z": self.z_weight}
        return {name: loss for name, loss in losses.items() if weights[name]}


def task_dependence(probabilities: Mapping[str, Tensor]) -> Tensor:
    r"""Return the mutual information of tasks and experts, in nats: high if each task has its own.

    .. math:: \sum_{t, e} p(t, e) \log \frac{p(t, e)}{p(t)\,p(e)}, \qquad p(t) = 1 / T

    Add its negative as an auxiliary loss to let experts serve few tasks each.

    Args:
        probabilities: By task, of the experts for each token, ``[tokens, experts]``.

    Source:
        Chen et al., Mod-Squad, CVPR 2023, equation of the mutual information.

    Example:
        >>> apart = {"depth": torch.tensor([[1.0, 0.0]]), "normal": torch.tensor([[0.0, 1.0]])}
        >>> round(task_dependence(apart).item(), 4)  # log 2
        0.6931
    """
    means = torch.stack([p.mean(0) for p in probabilities.values()])
    joint = means / len(means)
    overall = joint.sum(0)
    between: Tensor = torch.special.entr(means).sum() / len(means)
    total: Tensor = torch.special.entr(overall).sum()
    return total - between


class TaskRouted(MultiTaskModel):
    """A trunk whose stages know the task, such as transformer blocks with routers per task.

    A stage whose ``forward`` names ``task`` is told whose pass it is; it may return a pair of
    features and auxiliary losses by name. The stages before the first of these run once for all
    tasks, the others once per task. Routers of :class:`SparseMoE` are private, all else is shared.

    Args:
        stages: The trunk.
        heads: One module per task, which reads this task's features.

    Raises:
        TypeError: If the stages are no encoder.
        ValueError: If no stage names ``task``.

    Source:
        Liang et al., M³ViT, NeurIPS 2022.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.moe = SparseMoE(lambda: nn.Linear(4, 4), 4, n=3, k=2, tasks=("a", "b"))
        ...
        ...     def forward(self, x, task):
        ...         y, aux = self.moe(x, task=task)
        ...         return x + y, aux
        >>> model = TaskRouted([nn.Linear(3, 4), Block()], {"a": nn.Identity(), "b": nn.Identity()})
        >>> outputs, aux = model(torch.ones(2, 5, 3), return_aux=True)
        >>> sorted(aux)
        ['balance/1/a', 'balance/1/b']
    """

    def __init__(self, stages: Encoder, heads: Heads) -> None:
        super().__init__(heads)
        self.stages = nn.ModuleList(stages_of(self._owner, "stages", stages, several=True))
        routed = [number for number, stage in enumerate(self.stages) if _named_task(stage)]
        if not routed:
            raise ValueError(
                "TaskRouted: `stages` must hold one whose `forward` names `task`, got none."
            )
        self.first = routed[0]

    def encode(
        self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs
    ) -> Features:
        return self.by_batch(self._encode, tasks, x, named)

    def reach(self) -> Reach:
        layers = [layer for layer in self.modules() if isinstance(layer, SparseMoE)]
        private = [pair for layer in layers if layer.by_task for pair in layer.routers.items()]
        for name, router in private:
            yield router, (name,) if name in self.streams else ()
        yield from self._all_but(self.stages, [router for _, router in private])

    def receivers(self) -> Iterator[nn.Module]:
        yield from parts_of(self.stages)

    def _encode(self, streams: tuple[str, ...], x: Inputs, **named: Inputs) -> Features:
        stages = parts_of(self.stages)
        for stage in stages[: self.first]:
            x = call(stage, x, named)
        per_task: dict[str, Any] = {}
        aux: dict[str, Tensor] = {}
        for name in streams:
            z = x
            for number, stage in enumerate(stages[self.first :], self.first):
                z = call(stage, z, {**named, "task": name})
                if isinstance(z, tuple) and len(z) == 2 and isinstance(z[1], Mapping):
                    z, losses = z
                    aux |= {f"{kind}/{number}/{name}": loss for kind, loss in losses.items()}
            per_task[name] = z
        return Features(shared=(), per_task=per_task, aux=aux)


def _named_task(stage: nn.Module) -> bool:
    names = takes(stage, first=False)
    return names is not None and "task" in names
