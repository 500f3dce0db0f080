"""Every rule, every promise, every case; a new rule or transform edits nothing here."""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import FEW, FIVE, JACOBIANS, combine, keeps_gradients, losses_for, normal, seeded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradbal import make_rule
from gradbal.aggregation import Aggregation
from gradbal.rules._base import Claim, Context, Direction, GradientRule, GramRule, LossRule, Rule
from gradbal.rules._chain import Chain, chain
from gradbal.rules._registry import RULES
from gradbal.rules.transforms import TRANSFORMS
from gradbal.step.state import Core
from gradbal.step.weighting import MODEL

EXACT = 1e-9  # of what cancels
FLAT = 1e-7  # lengths that a Gram matrix in float64 cannot tell from zero, of what cancels


def _possible(transform: str, rule: Rule) -> bool:
    weighted = getattr(rule, "weighted", True)
    return min(rule.batches) == 1 and (weighted or not TRANSFORMS[transform]().needs_weights)


# rules of every kind: on losses, learning, observing, on norms, on the Gram matrix, random, with
# heads of their own, on gradients with weights and without
CHAINED = (
    *("gls", "uw", "famo", "dwa", "gradnorm", "mgda", "upgrad", "pcgrad", "nash_mtl", "imtl"),
    *("excess_mtl", "db_mtl", "moco", "graddrop"),
)

SUBJECTS: dict[str, Rule] = {name: make_rule(name) for name in RULES}
SUBJECTS |= {
    f"{transform} {name}": chain(transform, name)
    for transform in TRANSFORMS
    for name in CHAINED
    if _possible(transform, make_rule(name))
}


def _claims(name: str) -> frozenset[Claim]:
    rule = SUBJECTS[name]
    return rule.claims if isinstance(rule, Chain) else RULES[name].claims


def _cases(name: str) -> Iterable[str]:
    return JACOBIANS if name in RULES else FEW


# The cases that killed all mutants of a sample in which the others killed no further one.
QUICK = ("J3", "JR", "zero row", "conflicting, m=2", "six decades, m=8", "rank deficient")
QUICK_CHAINED = ("J3", "zero rows among others")


def _marked(name: str, case: str, *between: Claim) -> Any:
    """Return a set of parameters, slow unless the case is among the quick ones."""
    quick = case in (QUICK if name in RULES else QUICK_CHAINED)
    return pytest.param(name, *between, case, marks=[] if quick else pytest.mark.slow)


TRIALS = [(name, case) for name in SUBJECTS for case in _cases(name)]
PROMISES = [
    (name, claim, case)
    for name, case in TRIALS
    for claim in sorted(_claims(name), key=lambda claim: claim.name)
]

# ---------------------------------------------------------------------------- one step


@dataclass
class Setting:
    """Task gradients and losses, and those of a step before, if there was one."""

    jacobian: Tensor
    losses: Tensor
    past: Tensor | None = None
    past_losses: Tensor | None = None

    def ask(self, rule: Rule) -> Aggregation:
        state = None
        if self.past is not None and self.past_losses is not None:
            state = combine(self.past, rule, self.past_losses).state
        return combine(self.jacobian, rule, self.losses, state)

    def permuted(self, order: Tensor) -> "Setting":
        parts = (self.jacobian, self.losses, self.past, self.past_losses)
        return Setting(*(None if part is None else part[order] for part in parts))

    def scaled(self, factors: Tensor) -> "Setting":
        return Setting(self.jacobian * factors[:, None], self.losses, self.past, self.past_losses)


def first(jacobian: Tensor) -> Setting:
    return Setting(jacobian, losses_for(len(jacobian)))


def later(jacobian: Tensor, rule: Rule) -> Setting:
    """After a step on well-behaved gradients, so that nothing in the state is ambiguous."""
    m, n = jacobian.shape
    columns = n if keeps_gradients(rule) else 3 * m + 2
    return Setting(jacobian, losses_for(m), normal(m, columns, seed=m), losses_for(m, seed=1))


def weights_of(result: Aggregation) -> Tensor:
    assert result.weights is not None
    return result.weights


def cancelling(jacobian: Tensor, result: Aggregation) -> Tensor:
    """The length that the direction would have if nothing cancelled."""
    norms = jacobian.norm(dim=1)
    if result.weights is None:
        return torch.maximum(norms.sum(), result.direction.norm())
    return (result.weights.abs() * norms).sum()


def assert_near(ours: Tensor, theirs: Tensor, scale: Tensor) -> None:
    assert (ours - theirs).norm() <= FLAT * scale


# ---------------------------------------------------------------------------- promises


def non_conflicting(rule: Rule, setting: Setting) -> None:
    result = setting.ask(rule)
    scale = setting.jacobian.norm(dim=1) * cancelling(setting.jacobian, result)
    assert (setting.jacobian @ result.direction >= -EXACT * scale).all()


def equivariant(rule: Rule, setting: Setting) -> None:
    m = len(setting.jacobian)
    result = setting.ask(rule)
    scale = cancelling(setting.jacobian, result)
    for order in (torch.arange(m).flip(0), torch.randperm(m, generator=seeded(m))):
        other = setting.permuted(order).ask(rule)
        assert_near(other.direction, result.direction, scale)
        if result.weights is not None and _independent(setting.jacobian):
            theirs = weights_of(result)[order]
            torch.testing.assert_close(
                weights_of(other), theirs, rtol=1e-6, atol=1e-12 * theirs.abs().max().item()
            )


def homogeneous(rule: Rule, setting: Setting) -> None:
    result = setting.ask(rule)
    scale = cancelling(setting.jacobian, result)
    for factor in (1e-5, 3.0, 7e4):
        other = setting.scaled(torch.full_like(setting.losses, factor)).ask(rule)
        assert_near(other.direction / factor, result.direction, scale)


def scale_free(rule: Rule, setting: Setting) -> None:
    m = len(setting.jacobian)
    result = setting.ask(rule)
    for seed in range(3):
        factors = 10 ** (6 * torch.rand(m, generator=seeded(seed), dtype=torch.float64) - 3)
        scaled = setting.scaled(factors)
        other = scaled.ask(rule)
        scale = torch.maximum(
            cancelling(setting.jacobian, result), cancelling(scaled.jacobian, other)
        )
        assert_near(other.direction, result.direction, scale)


def linear(rule: Rule, setting: Setting) -> None:
    m = len(setting.jacobian)
    for seed in range(2):
        parts = 0.1 + 10 * torch.rand(2, m, generator=seeded(seed), dtype=torch.float64)
        whole = setting.scaled(parts.sum(dim=0))
        result = whole.ask(rule)
        halves = [setting.scaled(factors).ask(rule).direction for factors in parts]
        assert_near(halves[0] + halves[1], result.direction, cancelling(whole.jacobian, result))


def simplex(rule: Rule, setting: Setting) -> None:
    weights = weights_of(setting.ask(rule))
    assert (weights >= 0).all()
    assert abs(weights.sum() - 1) <= 1e-12


def sums_to_tasks(rule: Rule, setting: Setting) -> None:
    weights = weights_of(setting.ask(rule))
    assert (weights >= 0).all()
    assert abs(weights.sum() / len(weights) - 1) <= 1e-12


def _independent(jacobian: Tensor) -> bool:
    """Whether the rows, brought to length one, are far from dependent: then weights are unique."""
    norms = jacobian.norm(dim=1, keepdim=True)
    return bool((norms > 0).all()) and bool(
        torch.linalg.matrix_rank(jacobian / norms, rtol=1e-3) == len(jacobian)
    )


CHECKS: dict[Claim, Callable[[Rule, Setting], None]] = {
    Claim.NON_CONFLICTING: non_conflicting,
    Claim.EQUIVARIANT: equivariant,
    Claim.HOMOGENEOUS: homogeneous,
    Claim.SCALE_FREE: scale_free,
    Claim.LINEAR: linear,
    Claim.SIMPLEX: simplex,
    Claim.SUMS_TO_TASKS: sums_to_tasks,
}


@pytest.mark.parametrize(
    ("name", "claim", "case"), [_marked(name, case, claim) for name, claim, case in PROMISES]
)
def test_rule_keeps_its_promises(name: str, claim: Claim, case: str) -> None:
    rule, jacobian = SUBJECTS[name], JACOBIANS[case]
    CHECKS[claim](rule, first(jacobian))
    m, n = jacobian.shape
    if n >= m if keeps_gradients(rule) else rule.init(losses_for(m)):
        CHECKS[claim](rule, later(jacobian, rule))


def test_every_claim_is_checked_and_made() -> None:
    assert set(CHECKS) == set(Claim) == {claim for _, claim, _ in PROMISES}


# ---------------------------------------------------------------------------- unasked


@pytest.mark.parametrize(("name", "case"), [_marked(name, case) for name, case in TRIALS])
def test_finite_repeatable_and_without_side_effects(name: str, case: str) -> None:
    jacobian, rule = JACOBIANS[case], SUBJECTS[name]
    losses = losses_for(len(jacobian))
    state = combine(jacobian, rule, losses).state
    inputs = (jacobian, losses, state)
    before = _copy(inputs)
    results = [combine(jacobian, rule, losses, state) for _ in range(2)]
    assert same(inputs, before)
    for result in results:
        assert result.direction.shape == jacobian.shape[1:]
        assert result.direction.isfinite().all()
        if result.weights is not None:
            assert result.weights.shape == jacobian.shape[:1]
            assert result.weights.isfinite().all()
            assert_near(result.direction, jacobian.T @ result.weights, cancelling(jacobian, result))
        assert all(tensor.isfinite().all() for tensor in result.state["tensors"].values())
    assert same(tuple(results[0]), tuple(results[1]))


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_lone_task_keeps_its_direction(name: str) -> None:
    jacobian = torch.tensor([[3.0, -4.0, 1.0]], dtype=torch.float64)
    state = None
    for _ in range(3):
        result = combine(jacobian, SUBJECTS[name], losses_for(1), state)
        length = result.direction @ jacobian[0] / (jacobian[0] @ jacobian[0])
        assert length > 0
        if name == "m_config":  # which divides entry by entry, as Adam does
            assert (result.direction * jacobian[0] > 0).all()
        else:
            assert_near(result.direction, length * jacobian[0], cancelling(jacobian, result))
        state = result.state


@pytest.mark.parametrize("name", SUBJECTS)
def test_nothing_moves_without_gradients(name: str) -> None:
    jacobian = torch.zeros(3, 4, dtype=torch.float64)
    result = combine(jacobian, SUBJECTS[name], losses_for(3))
    assert torch.equal(result.direction, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("name", SUBJECTS)
def test_stopping_saving_loading_and_going_on_is_going_on(name: str) -> None:
    rule = SUBJECTS[name]
    steps = [(normal(3, 5, seed=seed), losses_for(3, seed=seed)) for seed in range(5)]
    through: Any = None
    states = []
    for jacobian, losses in steps:
        through = combine(jacobian, rule, losses, None if through is None else through.state)
        states.append(through.state)
    for stop, state in enumerate(states[:-1], start=1):
        for jacobian, losses in steps[stop:]:
            result = combine(jacobian, rule, losses, _saved(state))
            state = result.state
        assert same(tuple(result), tuple(through))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("name", RULES)
def test_losses_of_any_size(name: str, size: float) -> None:
    state = None
    for seed in range(4):
        losses = losses_for(3, seed=seed) * size
        result = combine(normal(3, 5, seed=seed), SUBJECTS[name], losses, state)
        state = result.state
        assert result.direction.isfinite().all()
        assert all(tensor.isfinite().all() for tensor in state["tensors"].values())


# ---------------------------------------------------------------------------- on the device

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select", "unique")


class NoReadBack(TorchDispatchMode):
    """Raise on an operation on whose result the host, or the shape of a tensor, would depend."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        by_mask = name in ("index", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or func.overloadpacket.__name__ in READS or by_mask:
            raise AssertionError(f"{func} reads back")
        return func(*args, **(kwargs or {}))


def context(
    rule: Rule, jacobian: Tensor, losses: Tensor, *, capturable: bool, seed: int = 0
) -> Context:
    core = Core(rule, tasks=len(losses), learner="adam", seed=seed, capturable=capturable)
    values, tasks = None if capturable else losses.tolist(), range(len(losses))
    ctx = core.context(MODEL, tasks, losses, values=values)
    ctx.buffers = core.buffers_for({0: jacobian}, tasks)
    return ctx


def ask(rule: Any, jacobian: Tensor, ctx: Context) -> list[Tensor]:
    """The weights or, for elementwise rules, the direction, and what heads get if it is apart."""
    if isinstance(rule, GradientRule):
        result = rule.direction([jacobian], [0], ctx)
    else:
        signal = ctx.losses if isinstance(rule, LossRule) else jacobian @ jacobian.T
        result = rule.weights(signal, ctx)
    if isinstance(result, Direction):
        return [*result.shared, result.heads]
    return [result] if isinstance(result, Tensor) else list(result)


def draws(rule: Rule, jacobian: Tensor, losses: Tensor) -> bool:
    answers = [
        ask(rule, jacobian, context(rule, jacobian, losses, capturable=False, seed=seed))
        for seed in range(16)
    ]
    return any(not torch.equal(answers[0][0], answer[0]) for answer in answers)


CAPTURABLE = [name for name, rule in SUBJECTS.items() if not getattr(rule, "probes", False)]


@pytest.mark.parametrize(
    ("name", "case"), [_marked(name, case) for name, case in TRIALS if name in CAPTURABLE]
)
def test_nothing_is_read_back_and_all_is_as_on_the_host(name: str, case: str) -> None:
    jacobian, rule = JACOBIANS[case], SUBJECTS[name]
    losses = losses_for(len(jacobian))
    device, host = (context(rule, jacobian, losses, capturable=flag) for flag in (True, False))
    with NoReadBack():
        ours = ask(rule, jacobian, device)
    theirs = ask(rule, jacobian, host)
    assert all(tensor.isfinite().all() for tensor in ours)
    if isinstance(rule, GradientRule) and not rule.weighted:
        if not draws(rule, jacobian, losses):  # elementwise draws come from elsewhere
            assert_near(ours[0], theirs[0], jacobian.norm(dim=1).sum() + theirs[0].norm())
        return
    scale = (theirs[0].abs() * jacobian.norm(dim=1)).sum()
    assert_near(jacobian.T @ ours[0], jacobian.T @ theirs[0], scale)
    for key, slope in host.slopes.items():
        torch.testing.assert_close(device.slopes[key], slope, rtol=1e-6, atol=1e-12)
    if _independent(jacobian):  # else weights need not be unique
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
        assert device.state.keys() == host.state.keys()
        for key, tensor in host.state.items():
            torch.testing.assert_close(device.state[key], tensor, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "m", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [name for name in CAPTURABLE if name in RULES])
def test_no_operation_depends_on_data(name: str, m: int) -> None:
    rule = SUBJECTS[name]
    core = Core(rule, tasks=m, learner="adam", seed=0)
    with FakeTensorMode():
        losses = torch.empty(m, dtype=torch.float64)
        state = core._new_state(m, losses.device)
        generator = torch.Generator()
        ctx = Context(losses=losses, state=state, source=generator, capturable=True)
        jacobian = torch.empty(m, 5, dtype=torch.float64)
        ctx.buffers, ctx.present = core.buffers_for({0: jacobian}, range(m)), torch.arange(m)
        elementwise = isinstance(rule, GradientRule) and not rule.weighted
        assert ask(rule, jacobian, ctx)[0].shape[-1] == (5 if elementwise else m)


OTHER_PATHS: list[tuple[str, dict[str, Any]]] = [  # options that lead through other code
    ("ferero", {"step_size": 0.5}),
    ("ferero", {"cone": ((1.0, 0.2), (0.1, 1.0), (1.0, 1.0))}),
    ("pmtl", {"initial_steps": 2}),
    ("pmtl", {"preferences": FIVE, "index": 0}),
]


@pytest.mark.parametrize(("name", "options"), OTHER_PATHS)
def test_other_paths_work_on_the_device(name: str, options: dict[str, Any]) -> None:
    rule = make_rule(name, **options)
    assert isinstance(rule, GramRule)
    jacobian, losses = normal(2, 5, seed=1), torch.tensor([0.5, 7.0], dtype=torch.float64)
    found = []
    for capturable in (False, True):
        core = Core(rule, tasks=2, learner="adam", seed=0, capturable=capturable)
        for _ in range(3):
            ctx = core.context(MODEL, range(2), losses)
            found.append(rule.weights(jacobian @ jacobian.T, ctx))
            core.commit(MODEL, [0, 1], ctx)
    torch.testing.assert_close(found[:3], found[3:])
    with FakeTensorMode():
        core = Core(rule, tasks=2, learner="adam", seed=0, capturable=True)
        ctx = core.context(MODEL, range(2), torch.empty(2).double())
        assert rule.weights(torch.empty(2, 2).double(), ctx).shape == (2,)


# ---------------------------------------------------------------------------- helpers


def _saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copy(value) for value in tree]
    return tree.clone() if isinstance(tree, Tensor) else tree


def same(a: Any, b: Any) -> bool:
    """Whether two trees are the same, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)
