"""One ordinary backward pass of the weighted losses, and the messages around passes."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from gradbal._utils.checks import OWNER
from gradbal._utils.dtensor import local, own_part
from gradbal.distributed import Processes
from gradbal.graph.losses import Batch
from gradbal.solvers.gram import added, all_finite, largest_entries
from gradbal.step.call import Call


def aux_gradients(
    batch: Batch | None, params: Sequence[Tensor], scale: Tensor | None
) -> dict[int, Tensor]:
    """Return the gradient of the summed auxiliary losses, by parameter."""
    if batch is None:
        return {}
    # the tasks' graphs may be the same
    return _gradients([batch.joined], [batch.seed(scale)], params, retain_graph=True)


def _gradients(
    tops: Sequence[Tensor], seeds: Sequence[Tensor], params: Sequence[Tensor], *, retain_graph: bool
) -> dict[int, Tensor]:
    """Return what this process holds of each parameter's gradient; ``.grad`` is left alone."""
    numbers = [n for n, param in enumerate(params) if param.requires_grad]
    inputs = [params[n] for n in numbers]
    grads = torch.autograd.grad(tops, inputs, seeds, retain_graph, allow_unused=True)
    pairs = zip(numbers, grads, strict=True)
    return {n: own_part(grad, params[n]) for n, grad in pairs if grad is not None}


@contextmanager
def leaving_word(processes: Callable[[], Processes]) -> Iterator[None]:
    """Tell the other processes, who will wait in vain, why this one goes no further."""
    try:
        yield
    except BaseException as error:
        processes().leave_word(error)
        raise


@contextmanager
def explaining_passes() -> Iterator[None]:
    """Say in this package's words why a graph cannot be passed once more, and what helps here.

    Torch's own advice, to retain the graph, leads to a further pass or to wrong rows.
    """
    try:
        yield
    except Exception as error:
        if "donated buffers" in str(error):
            raise RuntimeError(
                f"{OWNER}: a compiled part of the model can be gone through once only, because an "
                "ordinary backward pass came first when it was compiled; use the engine "
                "Representation, or an empty compiler cache and this optimizer from the first "
                "step on."
            ) from error
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                f"{OWNER}: the graph of the losses is used up; leave out `.backward()`, which "
                "`step(losses)` does, or compute the losses anew. To use one graph twice call "
                "`backward(losses, retain_graph=True)` first."
            ) from error
        if (name := _custom_function(error)) is not None:
            raise RuntimeError(
                f"{OWNER}: the backward of {name} failed in a pass for one task; if it can run "
                "only once, because it frees what it saved, use the engine Representation() or a "
                "rule on losses, which go through the trunk once. `mtl_opt.check(losses)` tells "
                "whether others can run more than once."
            ) from error
        raise


def _custom_function(error: BaseException) -> str | None:
    """Return the name of the ``autograd.Function`` whose backward raised an error, if one did."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if frame.f_code.co_name == "apply" and isinstance(node, BackwardCFunction):
            return type(node).__name__.removesuffix("Backward")
    return None


def pass_once(
    params: Sequence[Tensor],
    batch: Batch,
    weights: Tensor,
    scale: Tensor | None,
    call: Call,
    processes: Processes,
    *,
    only_ours: bool,
    capturable: bool,
) -> bool | Tensor:
    """Differentiate the weighted sum of the losses, and the auxiliary ones, into ``.grad``.

    Args:
        params: All parameters of the optimizer.
        batch: The present losses.
        weights: Their weights, shape ``[m]``.
        scale: Factor on all gradients; None for 1.
        call: The arguments of the call.
        processes: Among which the gradients are averaged, by DDP where it does so.
        only_ours: Leave the gradients of other parameters alone; what a reentrant checkpoint
            hides is not reached then.
        capturable: Leave the answer on the device.

    Returns:
        Whether the gradients are finite; looked at only under a scaler.
    """
    tops = [batch.joined]
    seeds = [batch.seed(weights if scale is None else weights * scale)]
    if (aux := call.aux_batch) is not None:
        tops, seeds = [*tops, aux.joined], [*seeds, aux.seed(scale)]
    inputs = [param for param in params if param.requires_grad]
    retain = call.retain_graph
    if processes.even:
        with processes.watch():
            torch.autograd.backward(
                tops, seeds, retain_graph=retain, inputs=inputs if only_ours else None
            )
        processes.complete()
    else:  # others might wait for what does not reach them from here
        found = _gradients(tops, seeds, params, retain_graph=retain)
        for number, grad in processes.average(found).items():
            old = params[number].grad
            params[number].grad = grad if old is None else added(old, grad)
    if scale is None:
        return True
    written = [local(param.grad) for param in inputs if param.grad is not None]
    if capturable:
        return largest_entries(written, batch.values.device).isfinite().all()
    return processes.all(all_finite(written, batch.values.device))
