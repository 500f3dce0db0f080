"""Which layers the tasks fight over."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradbal.diagnostics.course import cosines
from gradbal.graph.losses import Batch, Losses, named_losses, read_batch
from gradbal.graph.parameters import Parameters, tensors_of
from gradbal.solvers.gram import gram_matrix, outside_autocast, sparse_gram
from gradbal.step.one_pass import explaining_passes


@dataclass(frozen=True)
class Layers:
    """How the tasks stand to each other, layer by layer.

    Attributes:
        tasks: Names of the m present tasks.
        grams: For each layer that several tasks reach the inner products of their gradients
            there, shape ``[m, m]``, float64; zero for tasks that do not reach it.
    """

    tasks: tuple[str, ...]
    grams: dict[str, Tensor]

    @property
    def cosines(self) -> dict[str, Tensor]:
        """For each layer the cosines, shape ``[m, m]``; NaN where a gradient is zero."""
        return {name: cosines(gram) for name, gram in self.grams.items()}


@torch.no_grad()
@outside_autocast
def layer_conflicts(losses: Losses, layers: nn.Module | Mapping[str, Parameters]) -> Layers:
    """Compare task gradients layer by layer, for one batch; nothing changes.

    Costs one ordinary backward pass per task, and memory for all task gradients of the layers.

    Args:
        losses: One per task, as for ``MTLOptimizer.step``; their graph is kept.
        layers: A model, for one layer per parameter tensor; or a mapping from names to modules or
            parameters, such as ``dict(model.encoder.named_children())``.

    Returns:
        What several tasks reach.

    Raises:
        TypeError: If losses or layers are something else.
        ValueError: If no layer is reached by several tasks.
    """
    if isinstance(layers, nn.Module):
        layers = dict(layers.named_parameters())
    members = {name: tensors_of(part) for name, part in layers.items()}
    names, found = named_losses(losses)
    batch = read_batch(found, range(len(found)))
    columns = _gradients(batch, [param for params in members.values() for param in params])
    grams = {}
    for name, params in members.items():
        rows = [columns[id(param)] for param in params if id(param) in columns]
        reaching = {k for row in rows for k, grad in enumerate(row) if grad is not None}
        if len(reaching) > 1:
            host = [_gram(row).cpu() for row in rows]
            grams[name] = torch.stack(host).sum(dim=0)
    if not grams:
        raise ValueError(
            "layer_conflicts: no layer is reached by several losses, so there is nothing to "
            "compare; name parameters that several tasks use."
        )
    return Layers(tuple(names[i] if names else str(i) for i in batch.tasks), grams)


def _gradients(batch: Batch, params: list[Tensor]) -> dict[int, tuple[Tensor | None, ...]]:
    """Return each task's gradient of every parameter that one reaches, by its ``id``."""
    wanted = list({id(param): param for param in params if param.requires_grad}.values())
    with explaining_passes():
        passes = [
            torch.autograd.grad([edge], wanted, [seed], retain_graph=True, allow_unused=True)
            for edge, seed in zip(batch.edges, batch.seeds(None), strict=True)
        ]
    columns = zip(wanted, zip(*passes, strict=True), strict=False)  # without tasks there are none
    return {id(p): grads for p, grads in columns if any(grad is not None for grad in grads)}


def _gram(rows: tuple[Tensor | None, ...]) -> Tensor:
    """Return the inner products of one parameter's gradients; None counts as zero."""
    if any(row is not None and row.is_sparse for row in rows):
        return sparse_gram(rows)
    some = next(row for row in rows if row is not None)
    dense = torch.stack([torch.zeros_like(some) if row is None else row for row in rows])
    return gram_matrix(dense.view(len(rows), -1), scaled=True)
