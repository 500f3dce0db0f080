"""The plan of random graphs, against one found by following every path."""

from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plan_parts
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from gradbal.graph.heads_and_trunk import make_plan, mark
from gradbal.graph.walk import walk_graph


class Pair(torch.autograd.Function):
    """An operation of one's own, with two outputs, of which the second has no gradient."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, a: Tensor, b: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.mark_non_differentiable(rest := a.detach().clone())
        return a * 1 + b, rest

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


OPERATIONS = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "first": lambda a, b: a.sin(),
    "own": lambda a, b: Pair.apply(a, b)[0],
    "checkpoint": lambda a, b: checkpoint(torch.mul, a, b, use_reentrant=False),
    "stop": lambda a, b: a + b.detach(),
}
Recipe = list[tuple[str, int, int, bool]]  # operation, operands, whether another thread does it
RECIPES = st.lists(
    st.tuples(
        st.sampled_from(list(OPERATIONS)), st.integers(0, 60), st.integers(0, 60), st.booleans()
    ),
    min_size=1,
    max_size=14,
)


def build(recipe: Recipe, n_params: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return parameters and everything made of them, parameters first; operands may be any."""
    params = [torch.full((), 0.5 + i).requires_grad_() for i in range(n_params)]
    made = list(params)
    with ThreadPoolExecutor(1) as other:  # nodes are numbered anew in every thread
        for name, i, j, elsewhere in recipe:
            operands = made[i % len(made)], made[j % len(made)]
            do = OPERATIONS[name]
            made.append(other.submit(do, *operands).result() if elsewhere else do(*operands))
    return params, made


@settings(max_examples=300, deadline=None)
@given(RECIPES, st.integers(1, 5), st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_plan_of_random_graphs(recipe: Recipe, n_params: int, ends: list[int]) -> None:
    params, made = build(recipe, n_params)
    roots = [get_gradient_edge(made[-1 - end % len(made)]) for end in ends]
    index = {id(param): i for i, param in enumerate(params[1:])}  # one is foreign
    tasks = [3 * i + 1 for i in range(len(roots))]
    plan, wanted = make_plan(roots, tasks, index), plan_parts(roots, tasks, index)
    assert plan.reached == wanted.reached
    assert {(edge.node, edge.output_nr) for edge in plan.cut} == wanted.cut
    assert len(plan.cut) == len(wanted.cut)
    assert sorted(plan.trunk) == wanted.trunk
    assert [sorted(own) for own in plan.own] == wanted.own
    assert [sorted(above) for above in plan.above] == wanted.above
    assert plan.apart == wanted.apart
    assert plan.foreign == wanted.foreign


@settings(max_examples=100, deadline=None)
@given(RECIPES, st.integers(1, 5), st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_walk_of_random_graphs(recipe: Recipe, n_params: int, ends: list[int]) -> None:
    _, made = build(recipe, n_params)
    roots = [get_gradient_edge(made[-1 - end % len(made)]) for end in ends]
    walk = walk_graph(roots, range(len(roots)))
    place = {node: i for i, node in enumerate(walk.order)}
    assert len(place) == len(walk.order)
    assert set(place) == set(walk.tasks) == set(walk.edges)
    for node in walk.order:
        for child, _ in node.next_functions:
            assert child is None or place[child] > place[node]


@settings(max_examples=100, deadline=None)
@given(RECIPES, st.integers(1, 5), st.integers(0, 60), st.integers(0, 60))
def test_marked_cut_of_random_graphs(recipe: Recipe, n_params: int, one: int, two: int) -> None:
    params, made = build(recipe, n_params)
    roots = [get_gradient_edge(made[-1]), get_gradient_edge(made[-1 - one % len(made)])]
    tag, marked = object(), made[two % len(made)]
    mark(marked, tag, 0)
    index = {id(param): i for i, param in enumerate(params)}
    plan = make_plan(roots, [0, 1], index, tag=tag)
    wanted = plan_parts(roots, [0, 1], index, top=get_gradient_edge(marked).node)
    assert {(edge.node, edge.output_nr) for edge in plan.cut} == wanted.cut
    assert sorted(plan.trunk) == wanted.trunk
    assert plan.apart == wanted.apart
