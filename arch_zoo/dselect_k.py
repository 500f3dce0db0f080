"""DSelect-k: gates that end up with at most k experts, by gradient descent alone."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from arch_zoo.encoders import Encoder
from arch_zoo.expert_model import Expert, ExpertModel, num_experts_of
from arch_zoo.gates import POOLED, Gate
from arch_zoo.inputs import Inputs, call
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach
from arch_zoo.selectors import SelectorGate
from arch_zoo.tensors import mix, stack


class DSelectK(ExpertModel):
    """A mixture of shared experts whose gates learn to use at most `k` of them.

    The penalties of task `t` are ``aux[t]`` of ``outputs, aux = model(x, return_aux=True)``, to be
    added to the losses: ``mtl_opt.step(losses, aux=aux)``; ``model(x)`` leaves them out. There are
    none with `num_experts` a power of two and ``entropy_weight=0``. All experts run; with
    ``condition="task"``, :meth:`prune` returns a model that runs only those it uses.

    Departures from the authors' code: penalties are means over the batch, not sums; the leak's
    floor is subtracted; all logits start in ``±gamma / 100``; the first logit of a selector is the
    lowest bit of an expert's code, there the highest.

    Args:
        expert: A factory of experts, a list of them, or an :class:`ExpertBank`.
        heads: One module per task, which reads the mixture.
        k: Selectors per task, at most the number of experts.
        num_experts: Number of experts; may be left out with a bank or a list.
        gamma: Width of the step within which a bit is undecided and learns; positive.
        condition: ``"example"`` selects for each example, ``"task"`` for the task as a whole.
        entropy_weight: Weight of the selectors' entropy; ``>= 0``.
        leak_weight: Weight of the penalty on selecting codes that no expert has; ``>= 0``.
        normalise: ``"layer"`` puts a layer norm without parameters between gate input and
            selectors, so that inputs of any scale leave all bits undecided at the start; it also
            hides the scale and shift of an example from the gate, and all of an input of width 1.
            None, as published, passes the input on unchanged; its entries should be of the order
            of 1.
        gate: What the gates read, and their depth; not used by ``condition="task"``.
        stem: A shared encoder below experts and gates.

    Raises:
        TypeError: If the experts are one module, or the stem is no encoder.
        ValueError: If an option is out of range, or the heads cannot be named.

    Source:
        Hazimeh et al., DSelect-k, NeurIPS 2021, the static and the per-example gate.

    Example:
        >>> heads = {"click": nn.Linear(8, 1), "buy": nn.Linear(8, 1)}
        >>> model = DSelectK(lambda: nn.Linear(4, 8), heads, num_experts=3, k=2)
        >>> outputs, aux = model(torch.ones(5, 4), return_aux=True)
        >>> sorted(aux)
        ['buy', 'click']
    """

    def __init__(
        self,
        expert: Expert,
        heads: Heads,
        *,
        k: int,
        num_experts: int | None = None,
        gamma: float = 1.0,
        condition: str = "example",
        entropy_weight: float = 0.0,
        leak_weight: float = 1.0,
        normalise: str | None = None,
        gate: Gate = POOLED,
        stem: Encoder | None = None,
    ) -> None:
        if condition not in ("example", "task"):
            raise ValueError(
                f"DSelectK: `condition` must be 'example' or 'task', got {condition!r}."
            )
        if condition == "task":
            gate = Gate(_nothing, detach_input=True)
        super().__init__(
            heads,
            [expert],
            num_shared=num_experts_of("DSelectK", expert, num_experts),
            num_specific=0,
            gate=gate,
            make_gate=partial(
                SelectorGate,
                gate,
                k=k,
                gamma=gamma,
                by_example=condition == "example",
                entropy_weight=entropy_weight,
                leak_weight=leak_weight,
                normalise=normalise,
            ),
            stem=stem,
        )
        self.condition = condition

    def prune(self) -> "Pruned":
        """Return a copy with fixed weights and only the experts that some task gives a weight.

        It computes as this model does now, and a task runs its own experts alone.

        Raises:
            ValueError: If the gates look at examples, which may need any expert.
        """
        if self.condition != "task":
            raise ValueError(
                "DSelectK: `prune` needs gates with `condition='task'`, got 'example', where each "
                "example selects experts of its own."
            )
        (level,) = self._levels()
        with torch.no_grad():
            rows = {name: level.gates[name](torch.empty(1, 0))[0][0] for name in self.streams}
        experts = [] if level.shared is None else level.shared.to_modules()
        return Pruned(deepcopy(self.stem), experts, rows, self._copied_heads())


class Pruned(MultiTaskModel):
    """Experts mixed with fixed weights, each task running those alone that it gives a weight.

    Args:
        stem: A shared encoder below the experts, or None.
        experts: All experts; those without a weight are left out.
        weights: By task, one weight per expert.
        heads: One module per task.
    """

    def __init__(
        self,
        stem: nn.Module | None,
        experts: Sequence[nn.Module],
        weights: Mapping[str, Tensor],
        heads: Heads,
    ) -> None:
        super().__init__(heads)
        self.stem = stem
        self.used = {name: row.nonzero().flatten().tolist() for name, row in weights.items()}
        kept = sorted({number for numbers in self.used.values() for number in numbers})
        self.experts = nn.ModuleDict({str(number): experts[number] for number in kept})
        self.shares = nn.ParameterDict(
            {n: nn.Parameter(row[self.used[n]], requires_grad=False) for n, row in weights.items()}
        )

    def encode(
        self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs
    ) -> Features:
        return self.by_batch(self._encode, tasks, x, named)

    def reach(self) -> Reach:
        if self.stem is not None:
            yield self.stem, self.streams
        for name, numbers in self.used.items():
            yield self.shares[name], (name,)
            yield from ((self.experts[str(number)], (name,)) for number in numbers)

    def receivers(self) -> Iterator[nn.Module]:
        yield from [] if self.stem is None else [self.stem]
        yield from self.experts.children()

    def _encode(self, streams: tuple[str, ...], x: Inputs, **named: Inputs) -> Features:
        x = x if self.stem is None else call(self.stem, x, named)
        needed = sorted({number for name in streams for number in self.used[name]})
        done = {number: call(self.experts[str(number)], x, named) for number in needed}
        per_task = {}
        for name in streams:
            outputs = {f"expert {number}": done[number] for number in self.used[name]}
            stacked = stack("DSelectK", "the outputs of all experts", outputs)
            per_task[name] = mix("e", self.shares[name], stacked)
        return Features(shared=(), per_task=per_task, aux={})


def _nothing(x: object) -> Tensor:
    """Return what a gate reads that depends on the task alone: nothing, once for all examples."""
    return torch.empty(1, 0)
