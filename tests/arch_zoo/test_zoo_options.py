"""Options of single architectures: starts, masks, levels, warm-up, pruning, up paths, devices."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from zoo_cases import CASES, Kit, assert_sets, build, choose

from arch_zoo import (
    CGC,
    HPS,
    MTAN,
    PLE,
    DSelectK,
    ExpertBank,
    Gate,
    LearningToBranch,
    MMoE,
    OneBatch,
    PerTask,
    Schedule,
)
from arch_zoo.gates import SoftmaxGate
from arch_zoo.tensors import pooled

KIT = Kit("vector")
close = torch.testing.assert_close


# ---------------------------------------------------------------------- gates


def test_gates_start_as_linear_layers_do() -> None:
    gate = SoftmaxGate(Gate(), 5)
    gate(torch.ones(2, 16))
    weight = gate.layers[0].weight
    assert weight.abs().max() <= 1 / 4
    assert weight.std() > 0.1
    assert (SoftmaxGate(Gate(start="even"), 5)(torch.ones(2, 16))[0] == 0.2).all()


def test_equal_experts_under_even_gates_are_refused() -> None:
    pretrained = KIT.stage()
    sentence = (
        "experts must not start equal under gates that start even, because they would stay equal. "
        "Let the gates start at random, or make other experts."
    )

    def factory() -> nn.Module:
        return copy.deepcopy(pretrained)

    even = Gate(start="even")
    with pytest.raises(ValueError, match=f"^MMoE: {re.escape(sentence)}$"):
        MMoE(factory, KIT.heads(), num_experts=2, gate=even)
    with pytest.raises(ValueError, match=f"^CGC: {re.escape(sentence)}$"):
        CGC(factory, KIT.heads(), num_shared=2, num_specific=1, gate=even)
    assert MMoE(factory, KIT.heads(), num_experts=2)
    assert MMoE(factory, KIT.heads(), num_experts=1, gate=even)
    assert MMoE(KIT.stage, KIT.heads(), num_experts=2, gate=even)
    for backend in ("loop", "bmm", "vmap"):
        assert ExpertBank(factory, 2, backend=backend).starts_equal
        assert not ExpertBank(KIT.stage, 2, backend=backend).starts_equal


def test_masked_means_count_what_the_mask_keeps() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    close(pooled(x, mask), torch.stack([x[0, :2].mean(0), torch.zeros(3)]))
    close(pooled(x.mT, mask, "NCL"), pooled(x, mask))
    maps = x.reshape(2, 5, 3, 1)
    close(pooled(maps, layout="NHWC"), x.mean((1, 2), keepdim=True)[:, 0])
    assert Gate(mask=None).read(x, None, {"attention_mask": mask}).equal(x.mean(1))
    close(Gate(mask="keep").read(x, None, {"keep": mask})[0], x[0, :2].mean(0))
    with pytest.raises(
        ValueError, match=r"^Gate: `start` must be 'random' or 'even', got 'zero'\.$"
    ):
        Gate(start="zero")


# ---------------------------------------------------------------------- PLE


def test_levels_have_counts_of_their_own() -> None:
    torch.manual_seed(0)
    model = PLE(
        KIT.factories(3),
        KIT.heads(),
        num_shared=[2, 1, 0],
        num_specific=[1, {"a": 2, "b": 0, "c": 1}, 1],
    ).initialize(KIT.x())
    sizes = [(level.shared.n if level.shared else 0) for level in model.levels]
    assert sizes == [2, 1, 0]
    assert [level.specific["a"].n for level in model.levels] == [1, 2, 1]
    assert [level.shared_gate is not None for level in model.levels] == [True, False, False]
    assert_sets(model, model(KIT.x()))
    sentence = "PLE: `num_shared` must be one for all levels or one for each of the 2, got 3."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        PLE(KIT.factories(2), KIT.heads(), num_shared=[1, 1, 1], num_specific=1)


def test_shared_and_own_experts_may_be_unlike() -> None:
    torch.manual_seed(0)

    def deep() -> nn.Module:
        return nn.Sequential(KIT.stage(0), KIT.stage(1))

    level = {"shared": deep, "a": KIT.stage, "b": KIT.stage, "c": deep}
    model = CGC(level, KIT.heads(), num_shared=1, num_specific=1).initialize(KIT.x())
    bank = model.levels[0]
    x, gate = KIT.x(), bank.gates["a"]
    weights = gate(x)[0]
    z = weights[:, :1] * bank.specific["a"](x)[:, 0] + weights[:, 1:] * bank.shared(x)[:, 0]
    close(model(x)["a"], model.heads["a"](z))
    sentence = (
        "CGC: a level by name must have a factory for `shared` and for every task with experts, "
        "got none for 'c'."
    )
    del level["c"]
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        CGC(level, KIT.heads(), num_shared=1, num_specific=1)


# ---------------------------------------------------------------------- learning to branch


def test_choices_wait_for_the_end_of_the_warm_up() -> None:
    torch.manual_seed(0)
    model = LearningToBranch(KIT.factories(2), KIT.heads(), tau=Schedule(4.0, 1.0, warmup=2))
    x = KIT.x()
    nodes = [nn.ModuleList(model.nodes[d]) for d in range(2)]
    below = torch.stack([node(x) for node in nodes[0]]).mean(0)
    mean = torch.stack([node(below) for node in nodes[1]]).mean(0)
    outputs = model(x)
    close(outputs["a"], model.heads["a"](mean))
    outputs["a"].sum().backward()
    assert (model.choices[0].logits.grad == 0).all()
    assert (model.head_choices["a"].logits.grad == 0).all()
    for _ in range(2):
        assert model.tau().item() == 4.0
        model.tau.step()
    model(x)["a"].sum().backward()
    assert (model.head_choices["a"].logits.grad != 0).any()
    model.tau.step()
    close(model.tau().item(), 4 / 2**0.5)
    with pytest.raises(ValueError, match=r"^Schedule: `warmup` must be >= 0, got -1\.$"):
        Schedule(warmup=-1)


# ---------------------------------------------------------------------- DSelect-k


def test_selectors_read_their_input_as_published() -> None:
    torch.manual_seed(0)
    plain = DSelectK(KIT.stage, KIT.heads(), num_experts=4, k=2).initialize(KIT.x())
    normed = DSelectK(KIT.stage, KIT.heads(), num_experts=4, k=2, normalise="layer")
    normed.initialize(KIT.x()).load_state_dict(plain.state_dict())
    x = KIT.x()
    gates = [model.levels[0].gates["a"] for model in (plain, normed)]
    assert not torch.equal(gates[0](x)[0], gates[0](3 * x + 1)[0])
    close(gates[1](x)[0], gates[1](3 * x + 1)[0], rtol=0, atol=1e-5)
    close(gates[1](x)[0], gates[0](functional.layer_norm(x, (3,)))[0])
    sentence = "DSelectK: `normalise` must be 'layer' or None, got 'batch'."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        DSelectK(KIT.stage, KIT.heads(), num_experts=4, k=2, normalise="batch")


@pytest.mark.parametrize("stem", [True, False])
def test_a_pruned_model_computes_the_same_with_the_experts_it_needs(stem: bool) -> None:
    torch.manual_seed(0)
    model = DSelectK(
        lambda: KIT.stage(int(stem)),
        KIT.heads(),
        num_experts=8,
        k=2,
        condition="task",
        stem=KIT.stage if stem else None,
    ).initialize(KIT.x())
    for number, task in enumerate("abc"):  # experts 1 and 3 for a, then 2 and 3, and 3 alone
        logits = model.levels[0].gates[task].logits
        codes = [number + 1, 3]
        logits.data[:, :3] = torch.tensor(
            [[2 * (c >> b & 1) - 1.0 for b in range(3)] for c in codes]
        )
    pruned, x = model.prune(), KIT.x()
    close(pruned(x), model(x))
    assert sorted(pruned.experts) == ["1", "2", "3"]
    seen: list[str] = []
    for name, module in pruned.experts.items():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    pruned(x, ["c"])
    assert seen == ["3"]
    sets = pruned.parameter_task_sets()
    assert sets["experts.1.0.weight"] == {"a"}
    assert sets["experts.3.0.weight"] == {"a", "b", "c"}
    sentence = (
        "DSelectK: `prune` needs gates with `condition='task'`, got 'example', where each example "
        "selects experts of its own."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        DSelectK(KIT.stage, KIT.heads(), num_experts=4, k=2).prune()


# ---------------------------------------------------------------------- MTAN


def up_and_down() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh()),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(6, 4, 3, padding=1), nn.Tanh()),
    ]


def test_maps_are_refined_and_then_shrunk_or_enlarged_and_then_refined() -> None:
    model, x = MTAN(up_and_down(), {"a": nn.Identity()}, refine="conv"), torch.ones(2, 3, 8, 6)
    x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    model.initialize(x).eval()
    u, p = [], []
    h = x
    for body, tap in model.stages:
        h = body(h)
        u.append(h)
        h = tap(h)
        p.append(h)
    masks, refine = model.attention["a"], model.refine
    u = [
        functional.adaptive_max_pool2d(a, b.shape[2:])
        if a.shape[2] > b.shape[2]
        else functional.interpolate(a, b.shape[2:], mode="bilinear")
        for a, b in zip(u, p, strict=True)
    ]
    v = masks[0](u[0], 4) * p[0]
    r = functional.adaptive_max_pool2d(refine[0](v, 6), p[1].shape[2:])  # down: refine, then pool
    v = masks[1](torch.cat([u[1], r], 1), 6) * p[1]
    r = refine[1](functional.interpolate(v, p[2].shape[2:], mode="bilinear"), 4)  # up: resize first
    v = masks[2](torch.cat([u[2], r], 1), 4) * p[2]
    close(model.encode(x).per_task["a"], v)


def test_pooling_does_not_enlarge() -> None:
    sentence = (
        "MTAN: `resize` of `stages[2]` must be 'interp' or 'auto' where maps grow, got 'max' from "
        "[4, 3] to [8, 6]."
    )
    x = torch.ones(2, 3, 8, 6)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        MTAN(up_and_down(), {"a": nn.Identity()}, resize="max")(x)
    by_stage = MTAN(up_and_down(), {"a": nn.Identity()}, resize=["max", "avg", "interp"])
    assert by_stage(x)["a"].shape == (2, 4, 8, 6)


class Down(nn.Module):
    """A pooling that hands on where its maxima were."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.max_pool2d(x, 2, return_indices=True)  # type: ignore[no-any-return]


class Up(nn.Module):
    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        return functional.max_unpool2d(*given, 2)


class Aside(nn.Module):
    """A convolution that lets indices pass."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.conv(given[0]), given[1]


def test_a_segnet_with_the_indices_of_its_pooling() -> None:
    torch.manual_seed(0)
    stages = [
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()), Down()),
        (Aside(4, 4), Aside(4, 4)),
        (Up(), nn.Conv2d(4, 4, 3, padding=1)),
    ]
    model = MTAN(stages, {"a": nn.Conv2d(4, 2, 1)}, refine="conv")
    x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    assert model.initialize(x)(x)["a"].shape == (2, 2, 8, 6)
    feats = model.encode(x)
    trunk = x
    for body, tap in stages:
        trunk = tap(body(trunk))
    close(feats.shared[-1], trunk)
    sentence = "MTAN: a stage must return a tensor, or a tuple that starts with one, got dict."

    class Other(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        MTAN([Other()], {"a": nn.Identity()})(x)


# ---------------------------------------------------------------------- devices and graphs


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case != "DSelectK"))
        for case in CASES
        if case.isidentifier()
    ],
)
def test_graphs_take_any_number_of_examples(case: str) -> None:
    model, x, other = build(case, "vector").eval(), KIT.x(), KIT.x(7, seed=1)
    expected = model(other)
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    close(exported.module()(other), expected)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,), strict=False, check_trace=False)
        close(traced(other), expected)


BUILT_ON_META = [
    case for case in CASES if "AutoMTL" not in case and case != "LearningToBranch lowered"
]


@pytest.mark.parametrize("case", BUILT_ON_META)
def test_models_are_built_without_memory(case: str) -> None:
    with torch.device("meta"):
        model = CASES[case](KIT)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_stitches_find_their_start_again() -> None:
    from arch_zoo import CrossStitch

    with torch.device("meta"):
        model = CrossStitch(KIT.factories(2), KIT.heads(), granularity="layer")
    model = model.to_empty(device="cpu")
    for unit in model.units.values():
        for row in unit.rows.values():
            row.reset_parameters()
    rows = torch.stack(list(model.architecture_parameters()))
    close(rows, 0.85 * torch.eye(3) + 0.05)


def test_parameters_without_a_size_can_be_counted_after_one_input() -> None:
    model = MMoE(KIT.stage, KIT.heads(), num_experts=3)
    with pytest.raises(ValueError, match="uninitialized"):
        sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.initialize(KIT.x(1)).parameters()) > 0


@pytest.mark.parametrize("kind", [PerTask, OneBatch])
def test_wrappers_go_through_graphs(kind: type[dict[str, Tensor]]) -> None:
    class Sum(nn.Module):
        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return sum(x.values()) if isinstance(x, dict) else x

    model = HPS(Sum(), {"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    given = kind({"a": KIT.x(), "b": KIT.x(seed=1)})
    exported = torch.export.export(model, (given,)).module()
    close(exported(given), model(given))


CHOSEN: dict[str, Callable[[], LearningToBranch]] = {
    "hard": lambda: LearningToBranch(KIT.factories(2), KIT.heads()),
    "soft": lambda: LearningToBranch(KIT.factories(2), KIT.heads(), hard=False),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_tree_computes_what_the_likeliest_paths_do(name: str) -> None:
    model = CHOSEN[name]()
    choose(model, {"a": (0, 0), "b": (0, 1), "c": (2, 2)})
    close(model.lower().eval()(KIT.x()), model.eval()(KIT.x()))
