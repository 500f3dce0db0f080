"""Named modules as the place where task gradients are looked at."""

from collections.abc import Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from gradbal.distributed import Processes
from gradbal.graph import Place, Plan, mark, several
from gradbal.sinks import Represented
from gradbal.walk import Boundary, made_of_parameters


class Marker:
    """A forward hook that marks a module's outputs in the graph; it holds no tensor."""

    def __init__(self, tag: object, module: int) -> None:
        self.tag, self.module = tag, module

    def __call__(self, module: object, args: object, output: object) -> None:
        """Mark the outputs."""
        mark(output, self.tag, self.module)


def watch(modules: Sequence[nn.Module], tag: object) -> list[RemovableHandle]:
    """Mark the outputs of modules in every forward pass from now on."""
    return [
        module.register_forward_hook(Marker(tag, number)) for number, module in enumerate(modules)
    ]


def check_marks(plan: Plan, n_modules: int, *, mixed: bool) -> None:
    """Raise if a module took no part, or if its calls cannot be compared.

    Args:
        plan: The plan.
        n_modules: How many modules were named.
        mixed: Whether gradients of different inputs may meet.

    Raises:
        RuntimeError: In one sentence.
    """
    places = {edge.place for edge in plan.marked}
    for module in range(n_modules):
        if module not in {place[0] for place in places}:
            raise RuntimeError(
                f"Representation: module {module} of those named took no part in these losses; "
                "name modules whose outputs the losses depend on."
            )
    apart = not any(several(edge.tasks) for edge in plan.marked)
    if apart and not mixed and len(plan.marked) > len(places):
        raise RuntimeError(
            "Representation: each task has inputs of its own, and gradients for different inputs "
            'share no space; pass pool="batch" to sum them over the batch, or choose another '
            "engine."
        )


def boundary(plan: Plan) -> Boundary:
    """Return the cut, and after it the marked edges that are not on it."""
    cut = set(plan.cut)
    return (*plan.cut, *(edge for edge, *_ in plan.marked if edge not in cut))


def represented(plan: Plan, n_params: int, processes: Processes, *, pool: bool) -> Represented:
    """Return a sink whose rows are the gradients at the marked edges, or else at the cut."""
    sink = Represented(len(plan.tasks), len(plan.cut), n_params, processes, pool)
    position = {edge: i for i, edge in enumerate(boundary(plan))}
    if not plan.marked:
        sink.slots = [[i] for i in position.values()]
    elif not pool:
        sink.slots = [[position[edge]] for edge, *_ in plan.marked]
    else:
        calls: dict[Place, list[int]] = {}
        for edge, place, _ in plan.marked:
            calls.setdefault(place, []).append(position[edge])
        sink.slots = list(calls.values())
    sink.peers = plan.peers
    if processes.size > 1 and processes.even:
        edges = list(position)
        sink.alike = {i for i, slot in enumerate(sink.slots) if made_of_parameters(edges[slot[0]])}
    return sink
