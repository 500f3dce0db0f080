"""Every architecture under `MTLOptimizer`, which is told nothing about it but its losses.

Where the autograd graph has a cut: for HPS, MMoE, CGC, DSelectK and MTAN it is the edges of
`Features.shared`, one by one. The other three promise no cut, but their graphs have one: the
streams under the last unit of CrossStitch, all that the last level of PLE reads or mixes, and the
last nodes of LearningToBranch. So `Representation()` works there, too. It finds none, and says so,
where the tasks have inputs of their own; where they share nothing it is plain training.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from models import Pick, assert_same, data, grads, jacobian, lone_rows, wrapped
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from arch_zoo import CrossStitch, DSelectK, MultiTaskModel
from gradbal import aggregate, engines
from gradbal.graph.heads_and_trunk import Plan, make_plan, members
from gradbal.lab.models import architectures
from gradbal.lab.models.architectures import ARCHITECTURES

WITH_CUT = ("HPS", "MMoE", "MTAN", "CGC", "DSelectK")

Losses = dict[str, Tensor]


def stage(layer: Callable[..., nn.Module], *sizes: int) -> nn.Module:
    return nn.Sequential(layer(*sizes), nn.Tanh())


VECTORS = tuple(partial(stage, nn.Linear, width, 6) for width in (3, 6, 6))
PICTURES = tuple(
    partial(stage, nn.Conv2d, channels, 6, 3, stride, 1)
    for channels, stride in [(3, 1), (6, 2), (6, 2)]
)
KINDS = {"vectors": (VECTORS, (3,), 6), "pictures": (PICTURES, (3, 5, 7), 6 * 2 * 2)}

each = pytest.mark.parametrize("name", ARCHITECTURES)
every = pytest.mark.parametrize(("name", "kind"), [(n, k) for n in ARCHITECTURES for k in KINDS])


def batch(kind: str = "vectors", seed: int = 0) -> Tensor:
    return data(5, *KINDS[kind][1], seed=seed)


def heads(kind: str = "vectors") -> dict[str, nn.Module]:
    return {task: nn.Sequential(nn.Flatten(), nn.Linear(KINDS[kind][2], 2)) for task in "abc"}


def build(name: str, kind: str = "vectors") -> MultiTaskModel:
    torch.manual_seed(0)
    model: Any = architectures.build(name, KINDS[kind][0], heads(kind))
    model = model.initialize(batch(kind).float()).double()
    with torch.no_grad():  # gates, stitches and choices leave the even start
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.2 * data(*parameter.shape, seed=number)
    return model


def losses_of(outputs: dict[str, Tensor]) -> Losses:
    targets = {task: data(5, 2, seed=ord(task)) for task in outputs}
    return {task: (y - targets[task]).square().mean() for task, y in outputs.items()}


def losses(
    model: MultiTaskModel, kind: str = "vectors", tasks: Sequence[str] | None = None
) -> Losses:
    """Return the losses on a fixed batch, with fixed choices of branches."""
    torch.manual_seed(1)
    return losses_of(model(batch(kind), tasks))


def plan_of(model: MultiTaskModel, found: Losses) -> Plan:
    index = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    edges = [get_gradient_edge(loss) for loss in found.values()]
    return make_plan(edges, range(len(edges)), index)


def shared_by_sets(model: MultiTaskModel) -> list[int]:
    """Return the positions of the parameters that the model calls shared."""
    return [n for n, tasks in enumerate(model.parameter_task_sets().values()) if len(tasks) > 1]


def expected(model: MultiTaskModel, found: Losses, weights: Tensor) -> list[Tensor | None]:
    """Return weighted sums of lone gradients where several tasks meet, plain ones elsewhere."""
    params = list(model.parameters())
    rows = lone_rows(list(found.values()), params)
    shared = set(shared_by_sets(model))
    sums: list[Tensor | None] = []
    for number, column in enumerate(zip(*rows, strict=True)):
        factors = weights if number in shared else torch.ones_like(weights)
        terms = [w * g for w, g in zip(factors, column, strict=True) if g is not None]
        sums.append(torch.stack(terms).sum(dim=0) if terms else None)
    return sums


# ---------------------------------------------------------------------- task sets


@every
def test_a_step_finds_the_task_sets_of_the_model(name: str, kind: str) -> None:
    model = build(name, kind)
    optimizer = wrapped(model)
    optimizer.step(losses(model, kind))
    names, tasks = [n for n, _ in model.named_parameters()], optimizer.core.names
    found = {
        names[number]: frozenset(tasks[task] for task in members(bits))
        for number, bits in optimizer.core.sets.items()
    }
    assert found == model.parameter_task_sets()


@every
def test_the_plan_keeps_what_one_task_owns_out_of_the_jacobian(name: str, kind: str) -> None:
    model = build(name, kind)
    plan = plan_of(model, losses(model, kind))
    sets = list(model.parameter_task_sets().values())
    for task, own in zip(model.tasks, plan.own, strict=True):
        assert sorted(own) == [n for n, tasks in enumerate(sets) if tasks == {task}]
    shared = set(plan.trunk).union(*plan.above)
    assert sorted(shared) == shared_by_sets(model)


# ---------------------------------------------------------------------- task gradients


@every
@pytest.mark.parametrize("engine", [engines.Sequential(), engines.Batched(), engines.Batched(2)])
def test_engines_agree_with_lone_passes(
    name: str, kind: str, engine: engines.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(name, kind)
    for task, weights in enumerate(torch.eye(3, dtype=torch.float64)):
        model.zero_grad()
        wrapped(model, Pick(task), engine=engine).backward(losses(model, kind))
        assert_same(grads(model), expected(model, losses(model, kind), weights))
    assert not caplog.records  # nothing had to be differentiated in another way


@each
def test_the_step_is_that_of_the_whole_jacobian(name: str) -> None:
    model = build(name)
    wanted = upgraded(model, losses(model))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    wrapped(model, "upgrad", lr=0.1).step(losses(model))
    moved = [(b - p.detach()) / 0.1 for b, p in zip(before, model.parameters(), strict=True)]
    assert_same(moved, wanted)


def upgraded(model: MultiTaskModel, found: Losses) -> list[Tensor | None]:
    """Return what upgrad makes of some losses, from their whole Jacobian."""
    params = list(model.parameters())
    rows = lone_rows(list(found.values()), params)
    matrix = jacobian(rows, params, shared_by_sets(model))
    return expected(model, found, len(rows) * aggregate(matrix, "upgrad").weights)


# ---------------------------------------------------------------------- auxiliary losses


def selecting() -> DSelectK:
    """Return a model whose auxiliary losses are the entropies of its gates."""
    torch.manual_seed(0)
    options = {"num_experts": 4, "k": 2, "entropy_weight": 1.0, "leak_weight": 0.0}
    model = DSelectK(architectures.upper(VECTORS), heads(), stem=VECTORS[0], **options)
    return model.initialize(batch().float()).double()


@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop"])
def test_an_auxiliary_entropy_sharpens_the_gates(rule: str) -> None:
    ends = {}
    for with_aux in (False, True):
        model = selecting()
        optimizer = wrapped(model, rule, lr=0.1)
        for _ in range(30):
            outputs, aux = model(batch(), return_aux=True)
            optimizer.step(losses_of(outputs), aux=aux if with_aux else None)
        assert optimizer.core.names == ["a", "b", "c"]
        ends[with_aux] = model.encode(batch()).aux
    assert all(entropy < 0.9 * ends[False][task] for task, entropy in ends[True].items())


def test_auxiliary_losses_are_added_and_are_no_tasks() -> None:
    for rule in ("ew", "upgrad"):
        model = selecting()
        outputs, aux = model(batch(), return_aux=True)
        total = torch.stack(list(aux.values())).sum()
        extra, *_ = lone_rows([total], list(model.parameters()))
        optimizer = wrapped(model, rule)
        optimizer.backward(losses_of(outputs), retain_graph=True)
        plain, sets = grads(model), dict(optimizer.core.sets)
        model.zero_grad()
        optimizer.backward(losses_of(outputs), aux=aux)
        wanted = [g if e is None else g + e for g, e in zip(plain, extra, strict=True)]
        assert_same(grads(model), wanted)
        assert optimizer.core.sets == sets
        assert optimizer.core.names == list(model.tasks)


def test_parameters_that_only_auxiliary_losses_reach_get_their_gradient() -> None:
    model = selecting()
    outputs, aux = model(batch(), return_aux=True)
    optimizer = wrapped(model)
    optimizer.backward({t: loss for t, loss in losses_of(outputs).items() if t != "c"}, aux=aux)
    total = torch.stack(list(model.encode(batch()).aux.values())).sum()
    gate = list(model.levels[0].gates["c"].parameters())
    assert_same([p.grad for p in gate], torch.autograd.grad(total, gate))
    assert all(p.grad is None for p in model.heads["c"].parameters())


# ---------------------------------------------------------------------- representations


def test_a_representation_by_hand() -> None:
    model = build("HPS")
    z = model.encoder(batch())
    found = losses_of({task: head(z) for task, head in model.heads.items()})
    at_cut = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in found.values()]
    weights = 3 * aggregate(torch.stack([g.flatten() for g in at_cut]), "mgda").weights
    wanted = expected(model, losses(model), weights)
    for modules in ((), (model.encoder,)):
        model.zero_grad()
        engine = engines.Representation(*modules)
        wrapped(model, "mgda", engine=engine).backward(losses(model))
        assert_same(grads(model), wanted)


@every
def test_the_representation_is_where_the_graphs_meet(name: str, kind: str) -> None:
    model = build(name, kind)
    torch.manual_seed(1)
    feats = model.encode(batch(kind))
    found = losses_of(model.decode(feats))
    cut = plan_of(model, found).cut
    assert cut
    assert (name in WITH_CUT) == ({*cut} == {get_gradient_edge(z) for z in feats.shared})
    assert name in WITH_CUT or feats.shared == ()
    wanted = expected(model, losses(model, kind), weights_at(feats.shared or cut, found))
    wrapped(model, "upgrad", engine=engines.Representation()).backward(found)
    assert_same(grads(model), wanted)


def weights_at(cut: Sequence[Tensor | GradientEdge], found: Losses) -> Tensor:
    """Return what upgrad gives the tasks if it looks at the gradients there."""
    rows = [
        torch.autograd.grad(loss, cut, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in found.values()
    ]
    matrix = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return len(found) * aggregate(matrix, "upgrad").weights


def test_no_representation_where_inputs_differ() -> None:
    model, x = build("HPS"), {task: batch(seed=n) for n, task in enumerate("abc")}
    whole = (
        "^Representation: the tasks' graphs meet in parameters only, so there is "
        r"no representation to look at; name a module or choose another engine\.$"
    )
    with pytest.raises(RuntimeError, match=whole):
        wrapped(model, engine=engines.Representation()).step(losses_of(model(x)))


def test_a_representation_where_nothing_is_shared_is_plain_training() -> None:
    model = CrossStitch(VECTORS, heads(), stitch_after=()).double()
    wrapped(model, engine=engines.Representation()).backward(losses(model), aux={})
    assert_same(grads(model), expected(model, losses(model), torch.ones(3).double()))


# ---------------------------------------------------------------------- some of the tasks


@each
@pytest.mark.parametrize("rule", ["uw", "upgrad"])
def test_absent_tasks_are_left_alone(name: str, rule: str) -> None:
    model = build(name)
    optimizer = wrapped(model, rule)
    optimizer.step(losses(model))
    sets = dict(optimizer.core.sets)
    state = {key: t.clone() for key, t in optimizer.core.state["model"].items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = losses(model, tasks=["a", "c"])
    wanted = upgraded(model, found)
    optimizer.step(found)
    absent = {id(parameter) for parameter in model.task_parameters("b")}
    assert absent
    for n, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in absent), n
        assert id(parameter) not in absent or torch.equal(parameter, before[n]), n
    assert not torch.equal(model.heads["a"][1].weight, before["heads.a.1.weight"])
    for key, tensor in optimizer.core.state["model"].items():
        assert torch.equal(tensor[1], state[key][1])
    assert optimizer.core.sets == sets
    if rule == "upgrad":
        assert_same(grads(model), wanted)
