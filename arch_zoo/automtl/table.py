"""A table of what models cost, and the two models that any sharing is measured against."""

from collections.abc import Mapping

from torch import nn

from arch_zoo.automtl.costs import latencies, model_cost
from arch_zoo.encoders import Encoder, copies_of, module_of
from arch_zoo.hps import HPS
from arch_zoo.inputs import Inputs
from arch_zoo.model import MultiTaskModel
from arch_zoo.tree import Tree


def beside(model: MultiTaskModel, backbone: Encoder) -> dict[str, MultiTaskModel]:
    """Return a model after one network per task and after hard sharing, with the same heads.

    With a :class:`arch_zoo.Decoder` there is one network for each stream that it reads.

    Args:
        model: It names the tasks and has the heads, which are copied.
        backbone: That of the others, copied for each: a module or a list of blocks.

    Returns:
        Models by what they are, ready for :func:`cost_table`.
    """
    streams = model.streams
    copies = copies_of("beside", "backbone", backbone, len(streams) + 1)
    shared, *own = [module_of("beside", "backbone", copy) for copy in copies]
    paths = {stream: (i,) for i, stream in enumerate(streams)}
    return {
        f"{len(streams)} networks": Tree([dict(enumerate(own))], model._copied_heads(), paths),
        "hard sharing": HPS(shared, model._copied_heads()),
        type(model).__name__: model,
    }


def cost_table(models: Mapping[str, nn.Module], example: Inputs, rounds: int = 20) -> str:
    """Return a Markdown table of parameters, operations and time, each also against the first row.

    Args:
        models: By name, in the order of the rows.
        example: A batch, or one batch per task; parameters and operations do not depend on its
            size, times do.
        rounds: Passes per model to take the median of; 0 leaves the time out.

    Returns:
        Lines with a head, joined by line feeds. Operations are multiply-adds of one example.
    """
    costs = {name: model_cost(model, example) for name, model in models.items()}
    times = latencies(models, example, rounds) if rounds else {}
    base = next(iter(models))
    lines = ["| model | parameters | operations |" + (" time |" if times else "")]
    lines.append("|---|--:|--:|" + ("--:|" if times else ""))
    for name, cost in costs.items():
        pairs = zip(cost, costs[base], strict=True)
        cells = [name, *(f"{n:,} ({_ratio(n, against)})" for n, against in pairs)]
        if times:
            cells.append(_ratio(times[name], times[base]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(n: float, base: float) -> str:
    return f"{n / base:.2f}" if base else "-"
