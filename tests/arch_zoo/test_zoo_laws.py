"""Laws of single architectures: gates, selectors, stitches, masks, branches."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from zoo_cases import Kit, choose

from arch_zoo import (
    HPS,
    MTAN,
    PLE,
    CrossStitch,
    DSelectK,
    Gate,
    LearningToBranch,
    MMoE,
    Schedule,
)
from arch_zoo.gates import SoftmaxGate
from arch_zoo.selectors import SelectorGate, smooth_step

KIT = Kit("vector")
DOUBLE = torch.float64
law = settings(deadline=None, derandomize=True, database=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@law
@given(st.integers(1, 9), st.integers(1, 5), st.floats(0, 50), st.booleans())
def test_softmax_gates_lie_on_the_simplex(n: int, width: int, scale: float, deep: bool) -> None:
    gate = SoftmaxGate(Gate(hidden=(4,) if deep else (), start="even"), n).double()
    u = normal(3, width) * scale
    assert (gate(u)[0] == 1 / n).all()
    for parameter in gate.parameters():
        parameter.data = normal(*parameter.shape, seed=1)
    weights, penalty = gate(u)
    assert weights.shape == (3, n)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=DOUBLE))
    assert penalty is None


@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3), (4, 3, 5, 6), (4, 3, 2, 2, 2)])
def test_gates_read_pooled_flat_given_or_computed_features(shape: tuple[int, ...]) -> None:
    x, u = normal(*shape), normal(4, 2)
    axes = tuple(range(1, len(shape) - 1)) if len(shape) == 3 else tuple(range(2, len(shape)))
    assert torch.equal(Gate("pool").read(x, None), x.mean(axes) if axes else x)
    assert torch.equal(Gate("flatten").read(x, None), x.reshape(4, -1))
    assert Gate("given").read(x, u) is u
    assert torch.equal(Gate(torch.sin).read(x, None), x.sin())
    assert not Gate(detach_input=True).read(x.requires_grad_(), None).requires_grad


@pytest.mark.parametrize("model", ["MMoE", "PLE"])
def test_gates_read_what_the_caller_gives(model: str) -> None:
    gate, x = Gate("given"), KIT.x()
    torch.manual_seed(0)
    built = (
        MMoE(KIT.stage, KIT.heads(), num_experts=2, gate=gate)
        if model == "MMoE"
        else PLE(KIT.factories(2), KIT.heads(), num_shared=1, num_specific=1, gate=gate)
    )
    u = torch.ones(4, 2)
    built.initialize(x, gate_input=u)
    for parameter in built.levels[0].gates.parameters():
        nn.init.normal_(parameter)
    one, two = built(x, gate_input=u), built(x, gate_input=-u)
    assert not torch.allclose(one["a"], two["a"])
    mixed = built(x, gate_input={"a": u, "b": -u, "c": -u})
    torch.testing.assert_close(mixed, {"a": one["a"], "b": two["b"], "c": two["c"]})


@pytest.mark.parametrize("detach", [True, False])
def test_detached_gates_send_no_gradient_below(detach: bool) -> None:
    torch.manual_seed(0)
    gate = Gate(detach_input=detach)
    model = MMoE(KIT.stage, KIT.heads(), num_experts=2, gate=gate, stem=nn.Linear(3, 3))
    model.initialize(KIT.x())
    for parameter in model.levels[0].gates.parameters():
        nn.init.normal_(parameter)
    weights, _ = model.levels[0].gates["a"](gate.read(model.stem(KIT.x()), None))
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), model.stem.weight, allow_unused=True)
    assert (gradient is None) == detach
    assert len(model.encode(KIT.x()).shared) == 2 - detach


@law
@given(st.floats(-3, 3), st.floats(0.05, 4))
def test_smooth_step(t: float, gamma: float) -> None:
    x = torch.tensor(t, dtype=DOUBLE, requires_grad=True)
    y = smooth_step(x, gamma)
    (slope,) = torch.autograd.grad(y, x)
    assert 0 <= y <= 1
    torch.testing.assert_close(y + smooth_step(-x, gamma), torch.ones((), dtype=DOUBLE))
    inside = -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5
    expected = float(t > 0) if abs(t) >= gamma / 2 else inside
    torch.testing.assert_close(y.item(), expected, rtol=0, atol=1e-12)
    assert slope >= 0
    if abs(t) > gamma / 2:
        assert slope == 0


def test_smooth_step_is_steepest_in_the_middle() -> None:
    x = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    assert smooth_step(x, 0.5).item() == 0.5
    torch.testing.assert_close(torch.autograd.grad(smooth_step(x, 0.5), x)[0].item(), 3 / (2 * 0.5))


def selector(n: int, k: int, by_example: bool = True, **options: float) -> SelectorGate:
    torch.manual_seed(0)
    gate = SelectorGate(Gate(), n, k=k, by_example=by_example, **options).double()  # type: ignore[arg-type]
    gate(normal(2, 3))
    return gate


@pytest.mark.parametrize("by_example", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_selectors_share_out_all_codes(n: int, by_example: bool) -> None:
    gate = selector(n, 1, by_example)
    weights, penalty = gate(normal(6, 3))
    assert weights.shape == (6, n)
    assert (weights > 0).all()
    whole = n & (n - 1) == 0
    assert (penalty is None) == whole
    share = torch.full((6,), n / 2**gate.bits, dtype=DOUBLE)
    torch.testing.assert_close(weights.sum(1), share, rtol=0.1, atol=1e-9 if whole else 0.1)


def test_saturated_selectors_pick_at_most_k_and_stand_still() -> None:
    gate = selector(5, 2, by_example=False)
    gate.logits.data = torch.tensor([[3.0, -3.0, -3.0, 0.2], [-3.0, -3.0, 3.0, 0.7]], dtype=DOUBLE)
    weights, _ = gate(normal(4, 3))
    q = torch.softmax(gate.logits[:, -1], dim=0)
    for row in weights:
        torch.testing.assert_close(row[[1, 4]], q)
        assert row[[0, 2, 3]].tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad((weights * normal(4, 5)).sum(), gate.logits)
    assert (gradient[:, :-1] == 0).all()
    assert (gradient[:, -1] != 0).all()


def test_gamma_enters_the_forward_pass() -> None:
    narrow, wide = selector(4, 1, False, gamma=0.5), selector(4, 1, False, gamma=2.0)
    narrow.logits.data.fill_(0.2), wide.logits.data.fill_(0.2)
    u = normal(1, 3)
    assert narrow(u)[0][0, 3] > wide(u)[0][0, 3] + 0.1


def test_selector_penalties() -> None:
    gate = selector(3, 2, by_example=False, leak_weight=1.0, entropy_weight=0.0)
    gate.logits.data[:, :-1] = 0  # shares are 1/4 each, of which codes 0, 1, 2 are experts
    torch.testing.assert_close(gate(normal(5, 3))[1].item(), 2 * (4 / 3 - 1))
    gate = selector(4, 2, by_example=False, entropy_weight=0.5)
    gate.logits.data[:, :-1] = 0
    entropy = 2 * torch.tensor(4.0).log()
    torch.testing.assert_close(
        gate(normal(5, 3))[1].item(), 0.5 * entropy.item(), rtol=1e-4, atol=0
    )
    gate.logits.data[:, :-1] = 5
    assert abs(gate(normal(5, 3))[1].item()) < 1e-5


def test_penalties_reach_the_gate_of_their_task_alone() -> None:
    torch.manual_seed(0)
    model = DSelectK(KIT.stage, KIT.heads(), num_experts=3, k=2, entropy_weight=1.0)
    model.initialize(KIT.x())
    with torch.no_grad():
        assert model.train()(KIT.x(), ["a"], return_aux=True)[1].keys() == {"a"}
    _, aux = model(KIT.x(), return_aux=True)
    assert aux.keys() == set(model.tasks)
    for task, penalty in aux.items():
        assert penalty.shape == ()
        gradients = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert (gradient is not None) == name.startswith(f"levels.0.gates.{task}."), name


def test_entropy_of_selectors_falls_when_it_is_penalised() -> None:
    torch.manual_seed(0)
    model = DSelectK(KIT.stage, KIT.heads(), num_experts=4, k=1, entropy_weight=1.0)
    x = KIT.x()
    model.initialize(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        _, aux = model(x, return_aux=True)
        total = torch.stack(list(aux.values())).sum()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < 0.1 * history[0]


def test_selectors_move_with_the_model() -> None:
    model = DSelectK(KIT.stage, KIT.heads(), num_experts=3, k=2).initialize(KIT.x())
    assert {t.device.type for t in model.to("meta").state_dict().values()} == {"meta"}


def test_bits_of_bright_images_do_not_start_frozen() -> None:
    model = DSelectK(nn.Flatten, {"a": nn.Identity()}, num_experts=4, k=2, normalise="layer")
    x = 100 * torch.rand(8, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    logits: list[Tensor] = []
    model.initialize(x)
    model.levels[0].gates["a"].layers.register_forward_hook(lambda *a: logits.append(a[2]))
    model(x)
    assert logits[0].abs().max() < 0.25  # of a step that ends at 0.5


def test_every_stitch_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = CrossStitch(KIT.factories(4), KIT.heads(), stitch_last=True).initialize(KIT.x())
    sum(y.sin().sum() for y in model(KIT.x()).values()).backward()
    rows = list(model.architecture_parameters())
    assert len(rows) == 4 * 3
    assert all((row.grad != 0).all() for row in rows)


@pytest.mark.parametrize(("n_tasks", "start"), [(1, [[1.0]]), (2, [[0.9, 0.1], [0.1, 0.9]])])
def test_stitches_start_as_convex_combinations(n_tasks: int, start: list[list[float]]) -> None:
    heads = {name: nn.Identity() for name in "ab"[:n_tasks]}
    model = CrossStitch(KIT.factories(2), heads, granularity="layer")
    rows = torch.stack([row.data for row in model.architecture_parameters()])
    torch.testing.assert_close(rows, torch.tensor(start))


def test_a_network_may_use_one_module_twice() -> None:
    layer, act = nn.Linear(3, 3), nn.Tanh()
    model = CrossStitch({"a": [layer, act, layer, act]}, {"a": nn.Identity()})
    x = KIT.x()
    torch.testing.assert_close(model(x)["a"], act(layer(act(layer(x)))))
    act_twice = MTAN([(act, act)], {"a": nn.Identity()})
    assert act_twice.encode(x).shared[1].equal(act(act(x)))


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_container_with_a_forward_of_its_own_stays_whole() -> None:
    encoder, x = Doubled(nn.Linear(3, 3), nn.Tanh()), KIT.x()
    for model in (
        HPS(encoder, {"a": nn.Identity()}),
        CrossStitch({"a": encoder}, {"a": nn.Identity()}),
        CrossStitch({"a": nn.ModuleList([encoder])}, {"a": nn.Identity()}),
    ):
        assert torch.equal(model(x)["a"], encoder(x))
    assert torch.equal(MTAN([encoder], {"a": nn.Identity()}).encode(x).shared[1], encoder(x))


def test_masks_lie_between_zero_and_one_and_learn() -> None:
    kit = Kit("image")
    torch.manual_seed(0)
    model = MTAN(kit.factories(3), kit.heads()).initialize(kit.x())
    masks: list[Tensor] = []
    for attention in model.attention["a"]:
        attention.register_forward_hook(lambda *args: masks.append(args[2]))
    outputs = model(kit.x())
    assert len(masks) == 3
    assert all(((mask > 0) & (mask < 1)).all() for mask in masks)
    outputs["a"].sin().sum().backward()
    assert all((p.grad != 0).any() for p in model.attention["a"].parameters())
    assert all(p.grad is None for p in model.attention["b"].parameters())


def test_closed_masks_hide_the_trunk() -> None:
    kit = Kit("image")
    model = MTAN(kit.factories(2), kit.heads()).initialize(kit.x())
    last = model.attention["a"][-1].excite.norm
    nn.init.zeros_(last.weight), nn.init.constant_(last.bias, -200.0)
    assert (model.encode(kit.x()).per_task["a"] == 0).all()


def test_equal_masks_see_equal_features() -> None:
    kit = Kit("image")
    model = MTAN(kit.factories(2), kit.heads()).initialize(kit.x())
    model.attention["b"].load_state_dict(model.attention["a"].state_dict())
    features = model.encode(kit.x()).per_task
    assert torch.equal(features["a"], features["b"])


@pytest.mark.parametrize("resize", ["max", "avg", "interp"])
@pytest.mark.parametrize("refine", ["residual", "conv", None])
def test_mtan_fits_stages_of_any_stride(refine: str | None, resize: str) -> None:
    stages = [
        nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(8, 5, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ]
    model = MTAN(stages, {"a": nn.Linear(5, 2)}, refine=refine, resize=resize)
    for size in [(65, 97), (31, 16)]:
        assert model(torch.zeros(2, 3, *size))["a"].shape == (2, 2)


def test_mtan_tap_survives_an_activation_in_place() -> None:
    conv = nn.Conv2d(3, 4, 1)
    model = MTAN([nn.Sequential(conv, nn.ReLU(inplace=True))], {"a": nn.Identity()})
    x = Kit("image").x()
    body, tap = model.encode(x).shared
    assert torch.equal(body, conv(x))
    assert torch.equal(tap, conv(x).relu())


def test_mtan_halves_even_maps_as_pooling_does() -> None:
    model = MTAN(Kit("image").factories(1), {"a": nn.Identity()})
    x = normal(2, 3, 8, 6)
    like = normal(2, 3, 4, 3)
    assert torch.equal(model._fit(0, x, like), functional.max_pool2d(x, 2))


def test_temperature_falls_to_its_floor_and_is_saved() -> None:
    model = LearningToBranch(KIT.factories(2), KIT.heads(), tau=Schedule(4.0, 1.0))
    taus = []
    for _ in range(30):
        taus.append(model.tau().item())
        model.tau.step()
    assert taus == sorted(taus, reverse=True)
    torch.testing.assert_close(taus[:4], [4 / n**0.5 for n in range(1, 5)])
    assert taus[-1] == 1
    fresh = LearningToBranch(KIT.factories(2), KIT.heads(), tau=Schedule(4.0, 1.0))
    model.tau.steps.fill_(3)
    fresh.load_state_dict(model.state_dict())
    assert fresh.tau().item() == 2
    assert copy.deepcopy(model).tau().item() == 2


def test_branches_are_sampled_in_training_alone() -> None:
    torch.manual_seed(0)
    model, x = LearningToBranch(KIT.factories(2), KIT.heads()), KIT.x()
    drawn = {model(x)["a"].sum().item() for _ in range(20)}
    assert len(drawn) > 1
    model.eval()
    assert len({model(x)["a"].sum().item() for _ in range(5)}) == 1


def test_one_topology_serves_all_batches_of_a_step() -> None:
    model, x = LearningToBranch(KIT.factories(2), KIT.heads()), KIT.x()
    for choice in model.head_choices.values():
        choice.logits.data[0, 1] = 1e4
    torch.manual_seed(0)
    for _ in range(10):
        features = model.encode({task: x.clone() for task in model.tasks}).per_task
        torch.testing.assert_close(features["a"], features["b"])


def test_hard_samples_are_trees_with_a_gradient_for_every_logit() -> None:
    torch.manual_seed(0)
    model = LearningToBranch(KIT.factories(3), KIT.heads())
    for choice in [*model.choices, *model.head_choices.values()]:
        weights = choice(model.tau())
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
        assert ((weights.detach() - 0.5).abs() - 0.5).abs().max() < 1e-6
    total: list[Tensor] = [torch.zeros(())]
    for seed in range(5):
        total += [y.sin().sum() for y in model(KIT.x(seed=seed)).values()]
    torch.stack(total).sum().backward()
    assert all((p.grad != 0).all() for p in model.architecture_parameters())


def test_soft_samples_mix() -> None:
    torch.manual_seed(0)
    model = LearningToBranch(KIT.factories(2), KIT.heads(), hard=False)
    weights = model.choices[0](model.tau())
    assert ((weights > 0) & (weights < 1)).all()


def test_lowered_tree_runs_every_node_once() -> None:
    model = LearningToBranch(KIT.factories(2), KIT.heads())
    choose(model, {"a": (0, 0), "b": (0, 0), "c": (0, 2)})
    tree, seen = model.lower(), []
    for name, node in tree.named_modules():
        if name.count(".") == 2 and name.startswith("nodes"):
            node.register_forward_hook(lambda *_, name=name: seen.append(name))
    tree(KIT.x())
    assert seen == ["nodes.0.0", "nodes.1.0", "nodes.1.2"]
