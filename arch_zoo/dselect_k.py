"""DSelect-k: gates that end up with at most k experts, by gradient descent alone."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from arch_zoo.encoders import Encoder
from arch_zoo.expert_model import Expert, ExpertModel, num_experts_of
from arch_zoo.gates import POOLED, Gate
from arch_zoo.selectors import SelectorGate


class DSelectK(ExpertModel):
    """A mixture of shared experts whose gates learn to use at most `k` of them.

    The penalties of task `t` are ``Features.aux[t]``; there are none with `num_experts` a power of
    two and ``entropy_weight=0``. Departures from the authors' code: penalties are means over the
    batch, not sums; the leak's floor is subtracted; all logits start in ``±gamma / 100``.

    Args:
        expert: A factory of experts, a list of them, or an :class:`ExpertBank`.
        heads: One module per task, which reads the mixture.
        k: Selectors per task, at most the number of experts.
        num_experts: Number of experts; may be left out with a bank or a list.
        gamma: Width of the step within which a bit is undecided and learns; positive.
        condition: ``"example"`` selects for each example, ``"task"`` for the task as a whole.
        entropy_weight: Weight of the selectors' entropy; ``>= 0``.
        leak_weight: Weight of the penalty on selecting codes that no expert has; ``>= 0``.
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
        heads: Mapping[str, nn.Module],
        *,
        k: int,
        num_experts: int | None = None,
        gamma: float = 1.0,
        condition: str = "example",
        entropy_weight: float = 0.0,
        leak_weight: float = 1.0,
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
            ),
            stem=stem,
        )


def _nothing(x: Tensor) -> Tensor:
    """Return what a gate reads that depends on the task alone: the number of examples."""
    return torch.empty(len(x), 0, device=x.device)
