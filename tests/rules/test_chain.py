"""Transforms before rules: what they compute, what they pass on, what they promise."""

import copy
import io
import logging
import pickle
import re
from typing import Any

import pytest
import torch
from cases import J2, J3, losses_for, normal, rows
from torch import Tensor, nn

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.rules._base import Claim, Rule
from gradbal.rules._chain import Chain, GradientChain, GramChain, LossChain, chain
from gradbal.rules._registry import RULES
from gradbal.rules.transforms import TRANSFORMS, LogLosses, Momentum, Normalize, Smooth, Transform
from gradbal.step.weighting import MODEL

CHAINABLE = [name for name in RULES if min(RULES[name].rule.batches) == 1]


L3 = [0.5, 2.0, 1.0]


def close(ours: Tensor | None, theirs: list[float]) -> None:
    assert ours is not None
    expected = torch.tensor(theirs, dtype=ours.dtype)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def state_of(state: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = state["tensors"]
    return found


class TwoHeads(nn.Module):
    """Two positive losses on a shared layer, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.trunk = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
        self.heads = nn.ParameterList(
            torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2)
        )

    def losses(self, seed: int) -> list[Tensor]:
        hidden = normal(5, 4, seed=seed) @ self.trunk
        return [2 + (hidden @ head - k).square().mean() for k, head in enumerate(self.heads)]


def train(rule: str | Rule, *, logs: bool, n_steps: int = 3, **options: Any) -> list[Tensor]:
    model = TwoHeads()
    mtl_opt = MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), rule, **options)
    for seed in range(n_steps):
        losses = model.losses(seed)
        mtl_opt.step([loss.log() for loss in losses] if logs else losses)
    return [parameter.detach() for parameter in model.parameters()]


# ---------------------------------------------------------------------------- golden values


def test_logs_of_equal_weights() -> None:
    result = aggregate(rows(J3), chain("log_losses", "ew"), losses=L3)
    close(result.weights, [2, 0.5, 1])
    close(result.direction, [3.5, -0.5, 2.5, 4])


def test_smoothing() -> None:
    rule = chain("smooth", "mgda")
    first = aggregate(rows(J3), rule)
    close(first.weights, [0.547718, 0.273859, 0.178423])
    second = aggregate(rows(J3)[[2, 0, 1]], rule, state=first.state)
    close(second.weights, [0.510788, 0.301245, 0.187967])
    close(state_of(second.state)["0.average"], [0.510788, 0.301245, 0.187967])


@pytest.mark.parametrize("rule", ["ew", "mgda", "pcgrad"])
def test_smoothing_without_a_past_changes_nothing(rule: str) -> None:
    plain, smooth = rule, chain(Smooth(alpha=0.0), rule)
    states: list[Any] = [None, None]
    for seed in range(3):
        results = [
            aggregate(normal(3, 5, seed=seed), one, losses=losses_for(3), state=state)
            for one, state in zip([plain, smooth], states, strict=True)
        ]
        assert torch.equal(results[0].direction, results[1].direction)
        states = [result.state for result in results]


# ---------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("rule", [name for name in CHAINABLE if name != "gls"])
def test_log_losses_is_giving_the_logarithms(rule: str) -> None:
    ours, theirs = train(chain("log_losses", rule), logs=False), train(rule, logs=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "by"),
    [(name, by) for name in CHAINABLE for by in ("l2", "loss", "loss+")],
)
def test_normalize_is_giving_divided_gradients(rule: str, by: str) -> None:
    jacobian, losses = normal(3, 5, seed=4) * rows([[1], [20], [0.1]]), losses_for(3)
    sizes = torch.ones(3, dtype=torch.float64)
    if by != "l2":
        sizes = sizes * losses
    if by != "loss":
        sizes = sizes * jacobian.norm(dim=1)
    ours = aggregate(jacobian, chain(Normalize(by=by), rule), losses=losses)
    theirs = aggregate(jacobian / sizes[:, None], rule, losses=losses)
    torch.testing.assert_close(ours.direction, theirs.direction, rtol=1e-9, atol=1e-12)


def test_normalize_weighs_the_heads_of_loss_rules_only() -> None:
    model, plain = TwoHeads(), TwoHeads()
    for one, rule in ((model, chain("normalize", "ew")), (plain, chain("normalize", "upgrad"))):
        mtl_opt = MTLOptimizer(torch.optim.SGD(one.parameters(), lr=0.0), rule, scale="native")
        mtl_opt.step(one.losses(0))
        grads = [torch.autograd.grad(one.losses(0)[k], one.trunk)[0] for k in range(2)]
        norms = torch.stack([grad.norm() for grad in grads])
        factors = 1 / norms if rule.heads == "weighted" else torch.ones_like(norms)
        for k, head in enumerate(one.heads):
            own = torch.autograd.grad(one.losses(0)[k], head)[0]
            torch.testing.assert_close(head.grad, factors[k] * own)


def test_a_zero_gradient_stays_zero() -> None:
    result = aggregate(rows([[0, 0], [3, 4]]), chain("normalize", "ew"), losses=[1.0, 1.0])
    close(result.direction, [0.6, 0.8])


def test_the_first_transform_is_the_outermost() -> None:
    first = aggregate(rows(J3), chain("smooth", "log_losses", "ew"), losses=L3)
    second = {
        order: aggregate(rows(J3), chain(*order, "ew"), losses=[1, 1, 4], state=state)
        for order, state in (
            (("smooth", "log_losses"), first.state),
            (
                ("log_losses", "smooth"),
                aggregate(rows(J3), chain("log_losses", "smooth", "ew"), losses=L3).state,
            ),
        )
    }
    close(second["smooth", "log_losses"].weights, [1.9, 0.55, 0.925])
    close(second["log_losses", "smooth"].weights, [1, 1, 0.25])


def test_nested_chains_are_one() -> None:
    assert chain("smooth", chain("log_losses", "mgda")) == chain("smooth", "log_losses", "mgda")
    assert chain("mgda") == make_rule("mgda")


# ---------------------------------------------------------------------------- what is passed on


def test_kinds() -> None:
    assert isinstance(chain("log_losses", "ew"), LossChain)
    assert isinstance(chain("log_losses", "upgrad"), GramChain)
    assert isinstance(chain("log_losses", "graddrop"), GradientChain)
    assert isinstance(chain("normalize", "ew"), GramChain)
    assert isinstance(chain(Normalize(by="loss"), "ew"), LossChain)


def test_attributes_are_those_of_the_parts() -> None:
    names = ("scale", "heads", "learned", "learner", "learned_lr", "after", "per_task", "observes")
    for name in CHAINABLE:
        rule = make_rule(name)
        link = chain("log_losses", rule)
        assert [getattr(link, n) for n in names] == [getattr(rule, n) for n in names]
        assert link.needs_losses
        assert chain("smooth", "mgda").needs_losses is False
    assert chain("smooth", "gradnorm").norms_only
    assert chain("normalize", "ew").norms_only
    assert not chain("smooth", "mgda").norms_only


def test_learned_tensors_learn() -> None:
    for name in (name for name in CHAINABLE if RULES[name].rule.learned):
        model = TwoHeads()
        rule = chain("log_losses", "smooth", name)
        mtl_opt = MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), rule, tasks=2)
        for seed in range(3):
            mtl_opt.step(model.losses(seed))
        for learned in rule.learned:
            value = mtl_opt.core.state[MODEL][learned]
            assert not torch.equal(value, rule.init(torch.zeros(2))[learned].double())


def test_momentum_is_the_corrected_average() -> None:
    state, average = None, torch.zeros(3, 5, dtype=torch.float64)
    for step in range(1, 5):
        jacobian = normal(3, 5, seed=step)
        average = 0.8 * average + 0.2 * jacobian
        ours = aggregate(jacobian, chain(Momentum(beta=0.8), "mgda"), state=state)
        theirs = aggregate(average / (1 - 0.8**step), "mgda")
        torch.testing.assert_close(ours.direction, theirs.direction, rtol=1e-9, atol=1e-12)
        state = ours.state


def test_momentum_of_log_losses_smoothed_inside() -> None:
    state, average, weights = None, torch.zeros(3, 5, dtype=torch.float64), None
    for step in range(1, 4):
        jacobian, losses = normal(3, 5, seed=step), losses_for(3, seed=step)
        average = 0.9 * average + 0.1 * jacobian / losses[:, None]
        rows_now = average / (1 - 0.9**step)
        newest = aggregate(rows_now, "mgda").weights
        weights = newest if weights is None else 0.9 * weights + 0.1 * newest
        rule = chain("log_losses", "momentum", "smooth", "mgda")
        ours = aggregate(jacobian, rule, losses=losses, state=state)
        torch.testing.assert_close(ours.direction, rows_now.T @ weights, rtol=1e-9, atol=1e-12)
        state = ours.state


def test_a_rule_that_observes_sees_the_logarithms() -> None:
    ours = theirs = None
    for seed in range(4):
        jacobian, losses = normal(3, 5, seed=seed), losses_for(3, seed=seed)
        ours = aggregate(
            jacobian, chain("log_losses", "famo"), losses=losses, state=ours and ours.state
        )
        theirs = aggregate(
            jacobian / losses[:, None], "famo", losses=losses.log(), state=theirs and theirs.state
        )
        torch.testing.assert_close(ours.direction, theirs.direction)


def test_a_rule_that_does_not_observe_waits_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gradbal"):
        train(chain("smooth", "upgrad"), logs=False)
    assert "after the step" not in caplog.text


def test_options_with_one_number_per_task() -> None:
    rule = chain("smooth", make_rule("upgrad", preferences=(1.0, 0.0, 0.0)))
    ours = aggregate(rows(J3), rule).direction
    theirs = aggregate(rows(J3), make_rule("upgrad", preferences=(1.0, 0.0, 0.0))).direction
    torch.testing.assert_close(ours, theirs)
    sentence = "GramChain: `preferences` must have one number for each of the 2 tasks, got 3."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        aggregate(rows(J2), rule)


def test_absent_and_new_tasks() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    mtl_opt = MTLOptimizer(torch.optim.SGD([parameter], lr=0.0), chain("smooth", "gls"))

    def step(**values: float) -> Tensor:
        mtl_opt.step({name: value * parameter.prod() for name, value in values.items()})
        return mtl_opt.core.state[MODEL]["0.average"]

    close(step(a=1.0, b=4.0), [1.0, 0.25])
    close(step(b=2.0), [1.0, 0.9 * 0.25 + 0.1])
    close(step(a=1.0, c=4.0), [1.0, 0.325, 0.25])


def test_pickle_copy_equality_and_repr() -> None:
    rule = chain("log_losses", Smooth(alpha=0.5), "mgda")
    text = "GramChain(LogLosses(), Smooth(alpha=0.5), MGDA(normalize='none', solver='exact'))"
    assert repr(rule) == text
    for other in (pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule)):
        assert other == rule
        assert hash(other) == hash(rule)
        assert repr(other) == text
        assert other.needs_losses
    assert rule != chain("log_losses", "smooth", "mgda")


def test_state_belongs_to_one_chain() -> None:
    state = aggregate(rows(J3), chain("smooth", "mgda")).state
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    aggregate(rows(J3), chain(Smooth(alpha=0.1), "mgda"), state=loaded)
    sentence = (
        "aggregate: `state` belongs to the rule GramChain of Smooth of MGDA, this one is GramChain "
        "of Smooth of UPGrad; pass None to start anew."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        aggregate(rows(J3), chain("smooth", "upgrad"), state=loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype) -> None:
    for transform in TRANSFORMS:
        rule = chain(transform, "upgrad")
        ours = aggregate(rows(J3).to(dtype), rule, losses=L3).direction
        theirs = aggregate(rows(J3), rule, losses=L3).direction
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2)
    grads = aggregate(rows(J3).to(dtype), chain("log_losses", "graddrop"), losses=L3)
    assert grads.direction.dtype == dtype


# ---------------------------------------------------------------------------- promises


def claims_of(*links: str | Transform) -> frozenset[Claim]:
    rule = chain(*links)
    assert isinstance(rule, Chain)
    return rule.claims


def test_claims() -> None:
    mgda = RULES["mgda"].claims
    assert claims_of("log_losses", "mgda") == mgda - {Claim.SIMPLEX}
    assert claims_of("smooth", "mgda") == mgda - {Claim.NON_CONFLICTING}
    scale_free = mgda - {Claim.SIMPLEX, Claim.HOMOGENEOUS} | {Claim.SCALE_FREE}
    assert claims_of("normalize", "mgda") == scale_free
    assert claims_of(Normalize(by="loss"), "mgda") == mgda - {Claim.SIMPLEX}
    assert Claim.SCALE_FREE not in claims_of("smooth", "normalize", "mgda")

    class Unregistered(type(make_rule("ew"))):  # type: ignore[misc]  # a class of its own
        """A rule of the user's."""

    assert chain("log_losses", Unregistered()).claims == frozenset()


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("links", "sentence"),
    [
        ((), "chain: expected transforms and, at the end, a rule, got nothing."),
        (
            ("log_loses", "mgda"),
            "chain: unknown transform 'log_loses'. Did you mean 'log_losses'? "
            "Known: log_losses, momentum, normalize, smooth.",
        ),
        (
            ("mgda", "smooth"),
            "chain: 'smooth' is a transform, and the rule comes last; change their order.",
        ),
        (
            (3, "mgda"),
            "chain: a transform must be a name or an object of `gradbal.rules.transforms`, got 3; "
            "the rule comes last.",
        ),
        (
            ("smooth", 3),
            "A rule must be a registered name or a Rule object, got 3; "
            "`gradbal.rule_names()` lists all names.",
        ),
        (
            ("smooth", "graddrop"),
            "chain: Smooth(alpha=0.9) needs weights to work on, and GradDrop behind it makes a "
            "direction entry by entry; change their order or leave one out.",
        ),
        (
            ("smooth", "momentum", "mgda"),
            "chain: Smooth(alpha=0.9) needs weights to work on, and Momentum behind it makes a "
            "direction entry by entry; change their order or leave one out.",
        ),
        (
            ("log_losses", "forum"),
            "chain: FORUM looks at several batches, and a transform knows the losses of the first "
            "alone; use the rule without transforms.",
        ),
    ],
)
def test_links_that_cannot_be(links: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(sentence)}$"):
        chain(*links)


def test_options_that_cannot_be() -> None:
    sentence = "Smooth: `alpha` must be between 0 and 1, got 1.5."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Smooth(alpha=1.5)
    sentence = "Normalize: `by` must be one of 'l2', 'loss', 'loss+', got 'l1'."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Normalize(by="l1")  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize("owner", [LogLosses(), Normalize(by="loss")])
@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop"])
def test_losses_must_be_positive(owner: Transform, rule: str) -> None:
    sentence = (
        f"{type(owner).__name__}: losses must be > 0, got -2 for task '1'; shift the loss or "
        "choose a rule that does not take its logarithm."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        aggregate(rows(J3), chain(owner, rule), losses=[1.0, -2.0, 1.0])
