"""Computation graphs in which several losses share parameters in unusual ways.

Every case is a function that returns the parameters of an optimizer and a function that computes
the losses anew.
"""

from collections.abc import Callable
from typing import Any

import torch
from models import Toy, data, fill, param, square
from torch import Tensor, nn
from torch.nn import functional as F

Losses = Callable[[], list[Tensor]]
Case = tuple[list[Tensor], Losses]
CASES: dict[str, Callable[[], Case]] = {}


SINGLE = ("losses_of_two_dtypes",)  # part of it is computed in float32


def tolerance(build: Callable[[], Case]) -> float:
    return 1e-6 if build.__name__ in SINGLE else 1e-10


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    CASES[build.__name__] = build
    return build


X = data(6, 4, seed=50)


@case
def shared_trunk() -> Case:
    model = Toy()
    return list(model.parameters()), model.losses


@case
def partly_shared() -> Case:
    stem, left, right = (param(4, 4, seed=i) for i in range(3))
    own = [param(4, seed=10 + i) for i in range(3)]

    def losses() -> list[Tensor]:
        z = (X @ stem).tanh()
        a, b = (z @ left).tanh(), (z @ right).tanh()
        return [square(a @ own[0] - 1), square((a + b) @ own[1]), square(b @ own[2] + 1)]

    return [stem, left, right, *own], losses


@case
def frozen_and_unused() -> Case:
    model = Toy()
    model.trunk[0].bias.requires_grad_(False)
    model.heads[1].weight.requires_grad_(False)
    return [*model.parameters(), param(3, seed=9)], model.losses


@case
def tied() -> Case:
    table, bias = param(7, 4, seed=1), param(7, seed=2)
    words = torch.tensor([[0, 3, 3], [6, 1, 0]])

    def losses() -> list[Tensor]:
        z = table[words].mean(dim=1).tanh()
        return [(z @ table.t() + bias).logsumexp(dim=1).mean(), square(z - 1)]

    return [table, bias], losses


@case
def views_of_one_parameter() -> Case:
    weight = param(6, 4, seed=3)

    def losses() -> list[Tensor]:
        upper, lower = weight[:3], weight[3:]
        return [square(X @ upper.t()), square(X @ lower.t() - 1), square(weight.view(4, 6) + 1)]

    return [weight], losses


@case
def views_that_meet_only_in_the_parameter() -> Case:
    weight, own = param(8, seed=4), param(4, seed=5)
    return [weight, own], lambda: [square(weight[:4] * own), square(weight[4:] - 2)]


@case
def sparse_embedding() -> Case:
    model = fill(nn.ModuleList([nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2), nn.Linear(4, 1)]))
    words = torch.tensor([[0, 3, 3], [8, 1, 0]])

    def losses() -> list[Tensor]:
        z = model[0](words).sum(dim=1)
        return [square(model[1](z)), square(model[2](z.tanh()) - 1)]

    return list(model.parameters()), losses


@case
def sparse_embedding_tied_to_a_dense_layer() -> Case:
    table = fill(nn.Embedding(9, 4, sparse=True))
    words = torch.tensor([1, 5, 5])

    def losses() -> list[Tensor]:
        z = table(words)
        return [square(z - 1), square(z @ table.weight.t())]

    return [table.weight], losses


@case
def sparse_embedding_bag_with_losses_of_its_own() -> Case:
    bag = fill(nn.EmbeddingBag(9, 4, sparse=True, mode="sum"))
    left, right = torch.tensor([[0, 1], [2, 2]]), torch.tensor([[3, 8], [1, 0]])
    return [bag.weight], lambda: [square(bag(left) - 1), square(bag(right) + 1)]


@case
def several_cut_tensors() -> Case:
    model = fill(nn.ModuleList([nn.Linear(4, 4) for _ in range(5)]))

    def losses() -> list[Tensor]:
        stem = model[0](X).tanh()
        a, b = model[1](stem), model[2](stem)
        return [square(model[3](a) * b.tanh()), square(model[4](b) + a.sin()), square(a - b)]

    return list(model.parameters()), losses


@case
def chain_of_taps() -> Case:
    layers = fill(nn.ModuleList([nn.Linear(4, 4) for _ in range(4)]))

    def losses() -> list[Tensor]:
        z, out = X, []
        for layer in layers:
            z = layer(z).tanh()
            out.append(square(z - len(out)))
        return out

    return list(layers.parameters()), losses


@case
def feature_pyramid() -> Case:
    down = fill(nn.ModuleList([nn.Conv2d(c, 4, 3, stride=2, padding=1) for c in (2, 4, 4)]), 1)
    lateral = fill(nn.ModuleList([nn.Conv2d(4, 3, 1) for _ in range(3)]), 2)
    heads = fill(nn.ModuleList([nn.Conv2d(3, 1, 3, padding=1) for _ in range(3)]), 3)
    image = data(2, 2, 16, 16, seed=5)

    def losses() -> list[Tensor]:
        maps, z = [], image
        for conv in down:
            z = conv(z).relu()
            maps.append(z)
        top, outs = None, []
        for layer, head, feature in zip(lateral, heads, reversed(maps), strict=True):
            side = layer(feature)
            top = side if top is None else side + F.interpolate(top, scale_factor=2.0)
            outs.append(square(head(top) - 1))
        return outs

    return [p for part in (down, lateral, heads) for p in part.parameters()], losses


@case
def u_net() -> Case:
    convs = fill(nn.ModuleList([nn.Conv1d(c, 3, 3, padding=1) for c in (1, 3, 3, 6, 6)]), 4)
    heads = fill(nn.ModuleList([nn.Conv1d(3, 1, 1) for _ in range(2)]), 5)
    signal = data(2, 1, 8, seed=6)

    def losses() -> list[Tensor]:
        a = convs[0](signal).tanh()
        b = convs[1](F.avg_pool1d(a, 2)).tanh()
        c = convs[2](F.avg_pool1d(b, 2)).tanh()
        d = convs[3](torch.cat([F.interpolate(c, scale_factor=2.0), b], dim=1)).tanh()
        e = convs[4](torch.cat([F.interpolate(d, scale_factor=2.0), a], dim=1)).tanh()
        return [square(heads[0](e) - 1), square(heads[1](d)), square(c)]

    return [*convs.parameters(), *heads.parameters()], losses


@case
def attention_taps() -> Case:
    trunk = fill(nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), 6)
    masks = [fill(nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), 7 + k) for k in range(2)]

    def losses() -> list[Tensor]:
        z, mine = X, [0, 0]
        for depth, layer in enumerate(trunk):
            z = layer(z).tanh()
            mine = [mask[depth](z + m).sigmoid() * z for mask, m in zip(masks, mine, strict=True)]
        return [square(m - k) for k, m in enumerate(mine)]

    return [p for part in (trunk, *masks) for p in part.parameters()], losses


@case
def cross_stitch() -> Case:
    columns = [fill(nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), 9 + k) for k in range(2)]
    stitches = [param(2, 2, seed=20 + i) for i in range(2)]

    def losses() -> list[Tensor]:
        a = b = X
        for depth in range(3):
            a, b = columns[0][depth](a).tanh(), columns[1][depth](b).tanh()
            if depth < 2:
                alpha = stitches[depth]
                a, b = alpha[0, 0] * a + alpha[0, 1] * b, alpha[1, 0] * a + alpha[1, 1] * b
        return [square(a - 1), square(b + 1)]

    return [*columns[0].parameters(), *columns[1].parameters(), *stitches], losses


@case
def outputs_of_one_node() -> Case:
    model = fill(nn.ModuleList([nn.Linear(4, 6), nn.Linear(2, 2), nn.Linear(2, 2)]))

    def losses() -> list[Tensor]:
        a, b, c = model[0](X).tanh().chunk(3, dim=1)
        return [square(model[1](a) + c), square(model[2](b) - c), square(c - 2)]

    return list(model.parameters()), losses


@case
def a_head_with_several_outputs() -> Case:
    model = fill(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    return list(model.parameters()), lambda: list((model(X) - 1).square().mean(dim=0))


@case
def same_loss_twice() -> Case:
    model = Toy(2)

    def losses() -> list[Tensor]:
        a, b = model.losses()
        return [a, b, a]

    return list(model.parameters()), losses


@case
def losses_that_are_leaves() -> Case:
    one, two, weight = param(1, seed=1), nn.Parameter(torch.tensor(2.0).double()), param(3, seed=2)
    return [one, two, weight], lambda: [one, two, weight.square().sum() * one[0], two]


@case
def every_loss_the_same_leaf() -> Case:
    one = param(1, seed=1)
    return [one], lambda: [one, one]


@case
def a_loss_without_graph() -> Case:
    model = Toy(2)

    def losses() -> list[Tensor]:
        a, b = model.losses()
        return [a, torch.ones(()).double(), b]

    return list(model.parameters()), losses


@case
def nothing_shared() -> Case:
    a, b = param(3, seed=1), param(2, seed=2)
    return [a, b], lambda: [square(a - 1), square(b)]


@case
def one_task() -> Case:
    model = Toy(1)
    return list(model.parameters()), model.losses


@case
def one_task_apart() -> Case:
    model, other = Toy(2), param(3, seed=8)
    return [*model.parameters(), other], lambda: [*model.losses(), square(other + 1)]


@case
def scalars_and_empty_parameters() -> Case:
    zero_dim, empty = nn.Parameter(torch.tensor(0.5).double()), param(0, 4)
    weight, own_empty = param(4, seed=3), param(0)

    def losses() -> list[Tensor]:
        z = torch.cat([X * zero_dim, empty]) @ weight
        return [square(z), square(z - 1) + own_empty.sum()]

    return [zero_dim, empty, weight, own_empty], losses


@case
def only_an_empty_parameter_is_shared() -> Case:
    empty, a, b = param(0), param(2, seed=1), param(2, seed=2)
    return [empty, a, b], lambda: [square(a) + empty.sum(), square(b) - empty.sum()]


@case
def strided_parameters() -> Case:
    transposed = nn.Parameter(data(4, 3, seed=1).t())
    gapped = nn.Parameter(data(3, 8, seed=2)[:, ::2])
    image = nn.Parameter(data(2, 4, 3, 3, seed=3).contiguous(memory_format=torch.channels_last))

    def losses() -> list[Tensor]:
        z = X @ (transposed * gapped).t()
        y = F.conv2d(data(2, 4, 5, 5, seed=4), image)
        return [square(z) + square(y), square(z - y.mean()), square(y + 1)]

    return [transposed, gapped, image], losses


@case
def one_forward_pass_per_task() -> Case:
    trunk = fill(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), 1)
    heads = fill(nn.ModuleList([nn.Linear(4, 1) for _ in range(3)]), 2)

    def losses() -> list[Tensor]:
        return [square(head(trunk(data(5, 4, seed=k)))) for k, head in enumerate(heads)]

    return [*trunk.parameters(), *heads.parameters()], losses


@case
def inplace_and_index_operations() -> Case:
    weight, bias, own = param(4, 4, seed=1), param(4, seed=2), param(4, seed=3)

    def losses() -> list[Tensor]:
        z = X @ weight
        z += bias
        z[z < 0] *= 0.1
        picked = z.index_select(0, torch.tensor([0, 0, 3])).clone()
        picked[1] = picked[1].exp()
        picked.mul_(own)
        return [square(picked), square(z.sort(dim=0).values[2:]), z.cumsum(dim=0).sum()]

    return [weight, bias, own], losses


class Double(torch.autograd.Function):
    """Times two, with a gradient times three; also sets the attribute that leaves have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, variable: Tensor) -> Tensor:
        ctx.variable = variable
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 3, None


@case
def custom_function_that_looks_like_a_leaf() -> Case:
    weight, decoy = param(4, 4, seed=1), param(4, seed=2)
    own = [param(4, seed=3 + i) for i in range(2)]

    def losses() -> list[Tensor]:
        z = Double.apply(X @ weight, decoy.detach())
        return [square(Double.apply(z, own[0]) @ own[0]), square(z @ own[1] - 1)]

    return [weight, decoy, *own], losses


@case
def losses_of_two_dtypes() -> Case:
    weight, single = param(4, 4, seed=1), nn.Parameter(data(4, seed=2).float())

    def losses() -> list[Tensor]:
        z = X @ weight
        return [square(z), square(z.float() @ single), square(z.mean(0).float() - single)]

    return [weight, single], losses


@case
def leaf_that_no_optimizer_knows() -> Case:
    model, outside = Toy(2), param(5, seed=9)
    return list(model.parameters()), lambda: [loss * outside.sum() for loss in model.losses()]


@case
def gradient_penalty() -> Case:
    model = Toy(2)

    def losses() -> list[Tensor]:
        x = data(6, 4, seed=1).requires_grad_()
        a, b = model(x)
        (slope,) = torch.autograd.grad(a.sum(), x, create_graph=True)
        return [square(a) + square(slope), square(b - 1)]

    return list(model.parameters()), losses


@case
def forward_pass_under_vmap() -> Case:
    model = Toy(2)

    def losses() -> list[Tensor]:
        params = dict(model.named_parameters())

        def one(row: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.func.functional_call(model, params, (row[None],)))

        return [square(y) for y in torch.func.vmap(one)(X)]

    return list(model.parameters()), losses


@case
def twenty_four_tasks() -> Case:
    weight = param(3, 24, seed=1)
    return [weight], lambda: list((data(5, 3) @ weight).tanh().square().mean(dim=0).unbind())


@case
def a_deep_chain() -> Case:
    first, last = param(4, 4, seed=1), param(4, seed=2)

    def losses() -> list[Tensor]:
        z = X @ first
        for _ in range(3000):
            z = z * 1.0
        return [square(z), square(z * last)]

    return [first, last], losses
