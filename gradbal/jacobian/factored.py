"""Cotangents at the outputs of layers instead of the gradients of their weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradbal._utils import torch_private
from gradbal._utils.torch_private import LEAF, signed
from gradbal.graph.walk import Boundary
from gradbal.jacobian.layers import Convolution, Layer, Lookup, Matmul, Outer, Sketch, Use
from gradbal.jacobian.pull import Cotangents, Crossing, Rows, RowStream, Segment
from gradbal.jacobian.unformed import Product

Path = tuple[Node, int, list[Node], Node]  # a layer, a slot of it, what is between, a parameter

# By layer and slot of the parameter: the name of the tensor that is saved for its gradient. Where a
# release of torch names it otherwise, the gradient is formed.
SAVED = {
    "MmBackward0": {0: "mat2", 1: "self"},
    "AddmmBackward0": {1: "mat2", 2: "mat1"},
    "BmmBackward0": {0: "mat2", 1: "self"},
    "BaddbmmBackward0": {1: "batch2", 2: "batch1"},
    "ConvolutionBackward0": {1: "input"},
    "EmbeddingBackward0": {0: "indices"},
}
FIRST = ("mat2", "batch2")  # saved for the first of two operands

# Operations between layer and parameter after which its gradient has the same entries, in another
# order or dtype; those in SAME if they do not change the shape.
SAME = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ExpandBackward0")
CHAIN = {*SAME, "ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0"}

# Costs, in multiplications and additions of float32 (fitted on a CPU, for rows of 32 to 512).
DOUBLE = 2  # one in float64
ENTRY = 25  # an entry of the Jacobian: written, copied, read for the Gram matrix and at the end
IMAGE = 200  # an entry of an image that is laid out by rows
CALLS = 5_000_000  # what is called for a product and not for a formed gradient


def factored(segment: Segment, cotangents: Cotangents, *, crossing: Crossing) -> RowStream:
    """Go down by another crossing, and for some layers only to their outputs.

    Args:
        segment: A piece of the graph, with the layers whose gradients are not to be formed.
        cotangents: What goes down.
        crossing: How it goes down.
    """
    layers = segment.layers
    if not layers:
        yield from crossing(segment, cotangents)
        return
    params, proof = segment.params, segment.proof
    formed = [i for i in range(len(params)) if i not in layers]
    formed += [i for i in layers if proof is not None and proof.is_open(params[i])]
    edges = [edge for layer in layers.values() for edge in layer.edges]
    whole = segment._replace(params=[*(params[i] for i in formed), *edges], layers={})
    for tasks, found, below in crossing(whole, cotangents):
        row = dict(zip(formed, found, strict=False))
        outputs: Iterator[Any] = iter(found[len(formed) :])  # no products are among them
        for i, layer in layers.items():
            mine = [next(outputs) for _ in layer.edges]
            product = Product(layer, mine) if any(c is not None for c in mine) else None
            if i not in row or proof.agrees(params[i], row[i], product, tasks):
                row[i] = product
        yield Rows(tasks, [row[i] for i in range(len(params))], below)


class Proof:
    """Compares, once for each parameter, products with the gradients that autograd forms.

    They differ where a hook stands on what lies between a layer and its parameter (a view, a
    transpose, a cast), of which nothing can be seen in the graph. Such parameters are formed.
    """

    def __init__(self) -> None:
        self.verdicts: dict[int, bool] = {}  # by id of the parameter
        self.tolerance = 0.0

    def is_open(self, param: Tensor) -> bool:
        """Say whether nothing is known of a parameter yet, in this pass or an earlier one."""
        return id(param) not in self.verdicts

    def refuses(self, param: Tensor) -> bool:
        """Say whether a parameter's gradients must be formed."""
        return not self.verdicts.get(id(param), True)

    def agrees(
        self,
        param: Tensor,
        grad: Tensor | Product | None,
        product: Product | None,
        tasks: int | slice,
    ) -> bool:
        """Compare the gradients of one task, or of several with a leading axis."""
        if not isinstance(grad, Tensor) or product is None:
            return not isinstance(grad, Tensor)
        several = isinstance(tasks, slice)
        pairs = zip(grad if several else [grad], range(len(grad)), strict=False)
        for formed, i in pairs:
            found = (product[i] if several else product).to_dense()
            size = formed.abs().amax()
            if bool((found - formed).abs().amax() > self.tolerance * size):
                self.verdicts[id(param)] = False
                return False
            if bool(size > 0):
                self.verdicts.setdefault(id(param), True)
        return not self.refuses(param)


def find_layers(
    segment: Segment, n_tasks: int, sketch: Callable[[int], Sketch] | None = None
) -> dict[int, Layer]:
    """Find the parameters whose gradients are better left as products.

    Every use of such a parameter in the segment is one that is known here. Tensors that were
    saved under hooks (checkpoints, offloading) are let be: to unpack them may cost a forward pass.

    Args:
        segment: A piece of the graph.
        n_tasks: Number of tasks that go down.
        sketch: Gives the projection for a parameter, by position; None to be exact.

    Returns:
        By position in the segment.
    """
    position = {id(param): i for i, param in enumerate(segment.params)}
    paths, unknown = _paths(segment.top, segment.bottom)
    spoiled = {position.get(id(_parameter(leaf))) for leaf in unknown}
    found: dict[int, tuple[Tensor, list[GradientEdge], list[Use]]] = {}
    for node, slot, chain, leaf in paths:
        param = _parameter(leaf)
        i = position.get(id(param))
        if i is None or i in spoiled or (sketch is None and _never(param.numel(), n_tasks)):
            continue
        _, edges, uses = found.setdefault(i, (param.detach(), [], []))
        hooked = torch_private.has_tensor_hooks(param)
        use = None if hooked else _read(node, slot, chain, param.shape)
        if use is None or (uses and not use.goes_with(uses[0])):
            spoiled.add(i)
        else:
            edges.append(GradientEdge(node, 0))
            uses.append(use)
    layers = {}
    for i, (param, edges, uses) in found.items():
        if i in spoiled:
            continue
        small = None if sketch is None or not _shrinks(uses, sketch(i).size) else sketch(i)
        if worthwhile(uses, n_tasks, None if small is None else small.size):
            layers[i] = Layer(param, tuple(edges), uses, small)
    return layers


def worthwhile(uses: Sequence[Use], n_tasks: int, size: int | None = None) -> bool:
    """Say whether products cost less than to form gradients and to keep them.

    Args:
        uses: All uses of a parameter.
        n_tasks: Number of tasks.
        size: Number of dimensions of a sketch; None for exact inner products.
    """
    members, _, a, b = uses[0].sizes
    m, rows = n_tasks, sum(use.sizes.rows for use in uses)
    if isinstance(uses[0], Lookup):
        return m * rows < (m - 1) * b
    formed = m * a * b * (rows + ENTRY)
    square = DOUBLE * rows * rows * b if size is None else rows * b * size
    narrow = rows if size is None else size  # rows of what stands for the inputs
    entry = IMAGE if isinstance(uses[0], Convolution) else ENTRY
    gram = m * a * (DOUBLE * narrow * (rows + m) + rows * entry)
    direction = rows * a * b
    return members * (square + gram + direction) + CALLS < members * formed


def _shrinks(uses: Sequence[Use], size: int) -> bool:
    """Say whether a sketch has fewer rows than the layer has seen."""
    return isinstance(uses[0], Outer) and size < sum(use.sizes.rows for use in uses)


def _never(size: int, n_tasks: int) -> bool:
    r"""Say whether a parameter is too small for products, whatever the number of rows.

    They need less than about :math:`\sqrt{m a b}` rows.
    """
    return n_tasks * size * (ENTRY + math.sqrt(n_tasks * size)) < CALLS


def _paths(top: Boundary, bottom: Boundary) -> tuple[list[Path], set[Node]]:
    """Return the ways from layers to parameters, and the leaves of unknown uses."""
    stack = list({edge.node for edge in top})
    seen = {*stack, *(edge.node for edge in bottom)}
    unknown = set(stack)
    operands: list[tuple[Node, int, Node]] = []
    while stack:
        node = stack.pop()
        kind = type(node).__name__
        slots = SAVED.get(kind, {})
        for slot, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            if slot in slots:
                operands.append((node, slot, child))
            elif kind not in CHAIN:
                unknown.add(child)
            if child not in seen:
                seen.add(child)
                stack.append(child)
    paths = [(node, slot, *_follow(child)) for node, slot, child in operands]
    ends = {_follow(node)[1] for node in unknown}
    return [p for p in paths if type(p[-1]) is LEAF], {end for end in ends if type(end) is LEAF}


def _follow(node: Node) -> tuple[list[Node], Node]:
    """Return a chain and what it ends in."""
    chain = []
    while type(node).__name__ in CHAIN and (below := node.next_functions[0][0]) is not None:
        chain.append(node)
        node = below
    return chain, node


def _parameter(leaf: Node) -> Tensor:
    param: Tensor = leaf.variable  # type: ignore[attr-defined]  # of AccumulateGrad
    return param


def _read(node: Any, slot: int, chain: Sequence[Node], shape: torch.Size) -> Use | None:
    """Return what a layer has saved for the gradient of a parameter, if it can be used."""
    name = SAVED[type(node).__name__][slot]
    saved = _saved(node, name)
    if saved is None or not saved.numel() or torch_private.saved(node, "alpha", 1) != 1:
        return None
    if name not in ("indices", "input"):
        return _matmul(saved, name in FIRST, chain, shape)
    axes = tuple(range(len(shape)))
    if _reordered(axes, shape, chain) != (axes, shape):
        return None
    if name == "input":
        names = ("stride", "padding", "dilation", "groups", "transposed")
        return Convolution(saved, shape, *(torch_private.saved(node, name) for name in names))
    if torch_private.saved(node, "sparse") or torch_private.saved(node, "scale_grad_by_freq"):
        return None
    return Lookup(saved, signed(torch_private.saved(node, "padding_idx")), shape)


def _saved(node: Node, name: str) -> Tensor | None:
    """Return a plain tensor that was saved without hooks."""
    saved = torch_private.saved_tensor(node, name)
    if saved is None:
        return None
    saved = saved.detach()
    plain = type(saved) is Tensor and saved.layout == torch.strided and not saved.is_complex()
    return saved if plain else None


def _matmul(saved: Tensor, first: bool, chain: Sequence[Node], shape: torch.Size) -> Use | None:
    """Return a weight's use in a product of matrices."""
    *members, before, after = saved.shape
    b = before if first else after
    a = shape.numel() // max(1, math.prod(members) * b)
    axes = tuple(range(len(members)))
    axes += (len(axes), len(axes) + 1) if first else (len(axes) + 1, len(axes))
    order, bottom = _reordered(axes, (*members, *((a, b) if first else (b, a))), chain)
    return Matmul(saved, first, order, shape) if bottom == shape else None


def _reordered(
    axes: tuple[int, ...], shape: tuple[int, ...], chain: Sequence[Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Take the names of axes, and their lengths, down a chain; no lengths if it does more."""
    for node in chain:
        kind, n = type(node).__name__, len(axes)
        dims = list(range(n))  # where each axis above lies below
        if kind in SAME:
            if tuple(torch_private.saved(node, "self_sym_sizes")) != shape:
                return axes, ()
        elif kind == "TBackward0":
            dims.reverse()
        elif kind == "TransposeBackward0":
            i, j = (signed(torch_private.saved(node, name)) % n for name in ("dim0", "dim1"))
            dims[i], dims[j] = j, i
        elif kind == "PermuteBackward0":
            dims = [signed(dim) % n for dim in torch_private.saved(node, "dims")]
        back = [dims.index(i) for i in range(n)]
        axes, shape = tuple(axes[i] for i in back), tuple(shape[i] for i in back)
    return axes, shape
