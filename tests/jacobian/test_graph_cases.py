"""On every graph: task gradients, Gram matrix, direction and plan against lone passes."""

from collections.abc import Callable

import pytest
import torch
from graph_cases import CASES, Case, tolerance
from models import (
    Pick,
    assert_same,
    data,
    expected_grads,
    grads,
    jacobian,
    lone_rows,
    param,
    shared_positions,
    square,
    wrapped,
)
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from gradbal.graph.heads_and_trunk import make_plan

every = pytest.mark.parametrize("build", CASES.values(), ids=CASES)


@every
def test_task_gradients_are_those_of_lone_passes(build: Callable[[], Case]) -> None:
    params, losses = build()
    rows = lone_rows(losses(), params)
    shared = shared_positions(rows)
    present = [k for k, row in enumerate(rows) if any(g is not None for g in row)]
    members = [k for k in present if any(rows[k][i] is not None for i in shared)]
    for position, task in enumerate(members):
        optimizer = wrapped(params, Pick(position), heads="plain", scale="native")
        optimizer.backward(losses())
        zero = [torch.zeros_like(params[i]) if rows[task][i] is None else None for i in shared]
        wanted = [rows[task][i] if z is None else z for i, z in zip(shared, zero, strict=True)]
        assert_same([params[i].grad for i in shared], wanted, tolerance(build))
        optimizer.zero_grad()


@every
def test_gram_is_that_of_the_whole_jacobian(build: Callable[[], Case]) -> None:
    params, losses = build()
    rows = lone_rows(losses(), params)
    shared = shared_positions(rows)
    optimizer = wrapped(params, Pick())
    optimizer.backward(losses())
    assert optimizer.last is not None
    wanted = []
    if shared:
        matrix = jacobian(rows, params, shared)
        kept = [k for k, row in enumerate(rows) if any(row[i] is not None for i in shared)]
        wanted = [(matrix @ matrix.T)[kept][:, kept]]
    assert_same(optimizer.last.grams.values(), wanted, tolerance(build))


@every
@pytest.mark.parametrize("rule", ["ew", "upgrad", "mgda"])
def test_direction_is_the_rule_on_the_whole_jacobian(build: Callable[[], Case], rule: str) -> None:
    params, losses = build()
    wanted = expected_grads(losses(), params, rule)
    wrapped(params, rule).backward(losses())
    assert_same(grads(params), wanted, max(tolerance(build), 1e-9))


@every
@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_check_agrees(build: Callable[[], Case], engine: str) -> None:
    params, losses = build()
    found = wrapped(params, "upgrad", engine=engine).check(losses())
    assert max(found.values()) <= tolerance(build)


@every
def test_explaining_works(build: Callable[[], Case]) -> None:
    params, losses = build()
    text = wrapped(params, "upgrad").explain(losses())
    assert "tasks share" in text


@every
def test_pieces_add_up(build: Callable[[], Case]) -> None:
    """The same batch in two halves of the losses, put aside and resolved."""
    params, losses = build()
    wrapped(params, "mgda").backward(losses())
    wanted = grads(params)
    for p in params:
        p.grad = None
    optimizer = wrapped(params, "mgda")
    optimizer.backward([loss / 2 for loss in losses()], accumulate=True)
    optimizer.backward([loss / 2 for loss in losses()])
    assert_same(grads(params), wanted, max(tolerance(build), 1e-9))


@every
def test_reused_weights_pull_once(build: Callable[[], Case]) -> None:
    params, losses = build()
    optimizer = wrapped(params, "mgda", update_every=2)
    optimizer.backward(losses())
    wanted = grads(params)
    for p in params:
        p.grad = None
    optimizer.step(None)
    optimizer.backward(losses())
    assert_same(grads(params), wanted, max(tolerance(build), 1e-9))


@every
def test_cut_is_an_antichain(build: Callable[[], Case]) -> None:
    params, losses = build()
    roots = [get_gradient_edge(loss) for loss in losses() if loss.requires_grad]
    plan = make_plan(roots, range(len(roots)), {id(p): i for i, p in enumerate(params)})
    for edge in plan.cut:
        others = {other.node for other in plan.cut} - {edge.node}
        stack, below = [edge.node], set()
        while stack:
            found = {node for node, _ in stack.pop().next_functions if node} - below
            below |= found
            stack.extend(found)
        assert not below & others
    shared = {n for n, tasks in plan.reached.items() if tasks & (tasks - 1)}
    above = {n for part in plan.above for n in part}
    assert shared == above | set(plan.trunk)
    assert not above & set(plan.trunk)
    assert not shared & {n for part in plan.own for n in part}


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int) -> None:
    """Graphs drawn at random: every node sums a few earlier ones, every loss looks at a few."""
    draw = torch.Generator().manual_seed(seed)

    def some(limit: int) -> list[int]:
        count = int(torch.randint(1, 4, (), generator=draw))
        return torch.randint(limit, (count,), generator=draw).tolist()

    links = [some(i) for i in range(1, 12)]
    weights = [param(3, 3, seed=seed * 100 + i) for i in range(12)]
    uses = [some(12) for _ in range(4)]
    direct = [some(12)[0] for _ in range(4)]

    def losses() -> list[Tensor]:
        nodes = [(data(2, 3, seed=seed) @ weights[0]).tanh()]
        for weight, sources in zip(weights[1:], links, strict=True):
            nodes.append((sum(nodes[i] for i in sources) @ weight / 2).tanh())
        return [
            sum(square(nodes[i] - k) for i in use) + square(weights[extra])
            for k, (use, extra) in enumerate(zip(uses, direct, strict=True))
        ]

    rows = lone_rows(losses(), weights)
    for engine in ("sequential", "batched"):
        for task in range(4):
            optimizer = wrapped(weights, Pick(task), heads="plain", scale="native", engine=engine)
            optimizer.backward(losses())
            shared = shared_positions(rows)
            wanted = [
                torch.zeros_like(weights[i]) if rows[task][i] is None else rows[task][i]
                for i in shared
            ]
            assert_same([weights[i].grad for i in shared], wanted)
            optimizer.zero_grad()
    wanted = expected_grads(losses(), weights, "upgrad")
    wrapped(weights, "upgrad").backward(losses())
    assert_same(grads(weights), wanted, 1e-9)


def test_sharing_found_for_each_kind_of_parameter() -> None:
    params, losses = CASES["partly_shared"]()
    roots = [get_gradient_edge(loss) for loss in losses()]
    plan = make_plan(roots, range(3), {id(p): i for i, p in enumerate(params)})
    assert plan.reached == {0: 0b111, 1: 0b011, 2: 0b110, 3: 0b001, 4: 0b010, 5: 0b100}
    assert plan.own == [[3], [4], [5]]


def test_cross_stitch_has_an_empty_trunk() -> None:
    params, losses = CASES["cross_stitch"]()
    roots = [get_gradient_edge(loss) for loss in losses()]
    index = {id(p): i for i, p in enumerate(params)}
    plan = make_plan(roots, range(2), index)
    # the first layers lie below the mixture, and so do the first stitches' two rows
    shared = {n for n, tasks in plan.reached.items() if tasks == 0b11}
    last = {index[id(p)] for p in params[4:6]} | {index[id(p)] for p in params[10:12]}
    assert set(plan.reached) - shared == last


def test_sparse_gradients_are_foreseen() -> None:
    params, losses = CASES["sparse_embedding"]()
    roots = [get_gradient_edge(loss) for loss in losses()]
    assert make_plan(roots, range(2), {id(p): i for i, p in enumerate(params)}).sparse == {0}
