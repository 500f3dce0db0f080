"""STEM: embeddings of each task beside shared ones."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from arch_zoo.encoders import Encoder, Factory, module_of
from arch_zoo.experts import ExpertBank
from arch_zoo.gates import Gate, SoftmaxGate
from arch_zoo.inputs import Inputs, call
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach
from arch_zoo.tensors import blend

SHARED = "shared"


class STEM(MultiTaskModel):
    r"""Shared and task-specific embeddings, whose experts all tasks mix, others' without gradient.

    With embeddings :math:`x_1, \dots, x_T` of the tasks and a shared :math:`x_s`, experts :math:`E`
    and a stop of the gradient :math:`\mathrm{sg}`,

    .. math:: z_t = \sum_{\text{own}} g E_t(x_t) + \sum_{\text{others } s} g\,\mathrm{sg}(E_s(x_s))
        + \sum_{\text{shared}} g E(x_s), \qquad g = \operatorname{softmax}(G_t(x_t + x_s))

    So a task's embedding and experts learn from this task alone, while all others read them. A task
    alone runs the embeddings and experts of all.

    Args:
        embedding: A factory of embeddings, each from the batch to ``[batch, width]``, called once
            per task and once for the shared one.
        expert: A factory of experts.
        heads: One module per task, which reads the mixture.
        num_shared: Experts on the shared embedding; may be zero.
        num_specific: Experts on each task's embedding; at least one.
        gate: Depth and start of the gates; they read the sum of both embeddings.

    Raises:
        TypeError: If an embedding is no encoder, or the experts are one module.
        ValueError: If a number is out of range, or a task is called ``"shared"``.

    Source:
        Su et al., STEM: Unleashing the Power of Embeddings for Multi-task Recommendation,
        AAAI 2024, one layer, with a table of its own for every task.

    Example:
        >>> heads = {"click": nn.Linear(8, 1), "buy": nn.Linear(8, 1)}
        >>> model = STEM(lambda: nn.Linear(4, 6), lambda: nn.Linear(6, 8), heads)
        >>> sets = model.parameter_task_sets()
        >>> [sorted(sets[f"embeddings.{name}.weight"]) for name in ("click", "shared")]
        [['click'], ['buy', 'click']]
    """

    def __init__(
        self,
        embedding: Factory,
        expert: Factory,
        heads: Heads,
        *,
        num_shared: int = 1,
        num_specific: int = 1,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(heads)
        if num_shared < 0 or num_specific < 1 or SHARED in self.streams:
            raise ValueError(
                "STEM: `num_shared` must be >= 0, `num_specific` >= 1 and no task 'shared', got "
                f"{num_shared}, {num_specific} and {', '.join(map(repr, self.streams))}."
            )
        gate = Gate() if gate is None else gate
        names = (*self.streams, SHARED)
        n = num_specific * len(self.streams) + num_shared
        made: dict[str, Encoder] = {name: embedding() for name in names}
        self.embeddings = nn.ModuleDict(
            {name: module_of(self._owner, "embedding", part) for name, part in made.items()}
        )
        sizes = {**dict.fromkeys(self.streams, num_specific), SHARED: num_shared}
        self.experts = nn.ModuleDict(
            {name: ExpertBank(expert, size) for name, size in sizes.items() if size}
        )
        self.gates = nn.ModuleDict({name: SoftmaxGate(gate, n) for name in self.streams})

    def encode(
        self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs
    ) -> Features:
        return self.by_batch(self._encode, tasks, x, named)

    def reach(self) -> Reach:
        for name in self.streams:
            yield self.embeddings[name], (name,)
            yield self.experts[name], (name,)
            yield self.gates[name], (name,)
        yield self.embeddings[SHARED], self.streams
        if SHARED in self.experts:
            yield self.experts[SHARED], self.streams

    def receivers(self) -> Iterator[nn.Module]:
        yield from self.embeddings.children()

    def _encode(self, streams: tuple[str, ...], x: Inputs, **named: Inputs) -> Features:
        embedded = {name: call(part, x, named) for name, part in self.embeddings.items()}
        banks = {name: bank(embedded[name]) for name, bank in self.experts.items()}
        per_task: dict[str, Any] = {}
        for name in streams:
            weights, _ = self.gates[name](embedded[name] + embedded[SHARED])
            seen = [
                bank if source in (name, SHARED) else bank.detach()
                for source, bank in banks.items()
            ]
            per_task[name] = blend(weights, seen)
        return Features(shared=(), per_task=per_task, aux={})
