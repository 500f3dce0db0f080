"""NDDR, sluice networks, adapted trunks, AdaShare, sparse experts and groups, by their formulas."""

import re
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
import torch.utils.checkpoint
from more_cases import (
    MeanHead,
    Residual,
    adapted,
    convolutional,
    expert,
    make,
    normal,
    perceptron,
    picture,
    towers,
)
from torch import Tensor, nn
from torch.nn import functional

from arch_zoo import (
    HPS,
    Adapted,
    AdaShare,
    CrossStitch,
    RunOrSkip,
    SparseMoE,
    TaskAffinity,
    bottleneck,
    film,
    group_tasks,
    grouped,
    lookahead_affinity,
    lora,
    norm_per_task,
    squeeze_excite,
    task_dependence,
)

close = torch.testing.assert_close
HEADS = ("a", "b", "c")


def networks() -> dict[str, list[nn.Module]]:
    torch.manual_seed(0)
    return {name: [nn.Linear(3, 8), nn.Linear(8, 8)] for name in HEADS}


def heads() -> dict[str, nn.Module]:
    return towers(*HEADS, sizes=(8, 1))


# ---------------------------------------------------------------------- NDDR and sluice


def test_plain_nddr_starts_as_a_stitch_of_layers() -> None:
    nets, tops, x = networks(), heads(), normal(4, 3)
    stitched = CrossStitch(nets, tops, granularity="layer")
    reduced = CrossStitch(nets, tops, mix="nddr", norm=False, act=False)
    close(reduced.initialize(x)(x), stitched(x))


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 3, 5, 7), (4, 3)])
def test_nddr_is_a_layer_over_all_channels(shape: tuple[int, ...]) -> None:
    nets: dict[str, list[nn.Module]] = {name: [nn.Identity(), nn.Identity()] for name in "ab"}
    tops = {name: nn.Identity() for name in "ab"}
    model, x = CrossStitch(nets, tops, mix="nddr"), normal(*shape)
    model.initialize(x)
    row = model.units["0"].rows["a"]
    nn.init.normal_(row.weight)
    first = x.movedim(2, 1) if len(shape) == 3 else x
    joined = torch.cat([first, first], 1)
    y = torch.einsum("dc,bc...->bd...", row.weight.flatten(1), joined)
    axes = tuple(a for a in range(y.ndim) if a != 1)
    spread = y.var(axes, unbiased=False, keepdim=True)
    y = torch.relu((y - y.mean(axes, keepdim=True)) / (spread + 1e-5).sqrt())
    close(model(x)["a"], y.movedim(1, 2) if len(shape) == 3 else y)


def test_sluice_with_the_identity_is_a_network_per_task() -> None:
    nets, tops, x = networks(), heads(), normal(4, 3)
    model = CrossStitch(nets, tops, granularity="layer", subspaces=2, skips=True)
    for number, name in enumerate(HEADS):
        row = model.units["0"].rows[name].weight
        with torch.no_grad():
            row.zero_()
            row[0, number, 0] = row[1, number, 1] = 1
            model.skips[name].copy_(torch.tensor([0.0, 1.0]))
    alone = {t: tops[t](nets[t][1](nets[t][0](x))) for t in HEADS}
    close(model(x), alone)
    with torch.no_grad():
        model.skips["a"].copy_(torch.tensor([1.0, 0.0]))
    close(model(x)["a"], tops["a"](nets["a"][0](x)))  # an early exit


def test_sluice_mixes_parts_of_channels() -> None:
    nets, tops, x = networks(), {t: nn.Identity() for t in HEADS}, normal(4, 3)
    model = CrossStitch(
        {t: net[:1] for t, net in nets.items()},
        tops,
        granularity="layer",
        subspaces=2,
        stitch_last=True,
        orthogonality_weight=2.0,
    )
    row = model.units["0"].rows["b"].weight
    nn.init.normal_(row)
    halves = [nets[t][0](x).chunk(2, 1) for t in HEADS]
    parts = [sum(row[g, s, h] * halves[s][h] for s in range(3) for h in range(2)) for g in range(2)]
    outputs, aux = model(x, return_aux=True)
    close(outputs["b"], torch.cat(parts, 1))
    weights = [nets[t][0].weight.chunk(2) for t in HEADS]
    close(aux["orthogonality"], 2 * sum((a.T @ b).square().sum() for a, b in weights))
    starts = [
        r.weight
        for r in CrossStitch(nets, tops, granularity="layer", subspaces=2).units["0"].rows.values()
    ]
    assert all(torch.allclose(start.sum((1, 2)), torch.ones(2)) for start in starts)


# ---------------------------------------------------------------------- adapted trunks


RULES: dict[str, Callable[[], object]] = {
    "lora": lambda: lora(rank=2),
    "shared lora": lambda: lora(rank=2, shared_rank=3),
    "bottleneck": lambda: bottleneck("3|4", 2),
    "film": lambda: film("0"),
    "attention": lambda: squeeze_excite("4", 2),
    "norms": norm_per_task,
}


@pytest.mark.parametrize("rule", RULES)
def test_an_adapted_trunk_starts_as_the_trunk(rule: str) -> None:
    torch.manual_seed(0)
    trunk, tops, x = convolutional(), {"a": MeanHead(1), "b": MeanHead(2)}, picture()
    trunk(x)
    model = Adapted(trunk, tops, [RULES[rule]()]).eval()
    close(model(x), HPS(trunk.eval(), tops)(x))


@pytest.mark.parametrize("rule", RULES)
def test_one_pass_is_a_pass_per_task(rule: str) -> None:
    torch.manual_seed(0)
    model = adapted(RULES[rule]()).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    x = picture()
    apart = model(x)
    assert not torch.allclose(*[y[:, 0] for y in apart.values()])
    with torch.no_grad():
        close(model(x), apart)
    model.batched = True
    close(model(x), apart)


def test_low_rank_updates_are_merged_weights() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(3, 8), nn.Flatten(1), nn.Linear(8, 5))
    model = Adapted(trunk, {"a": nn.Identity(), "b": nn.Identity()}, [lora(2, 6.0, shared_rank=1)])
    for parameter in model.double().parameters():
        nn.init.normal_(parameter)
    x = normal(4, 3).double()
    for task, y in model(x).items():
        h = x
        for number in (0, 2):
            layer = model.encoder[number]
            own, common = layer.specific[task], layer.shared
            weight = layer.base.weight + 3 * own.up.weight @ own.down.weight
            weight = weight + 6 * common.up.weight @ common.down.weight
            h = functional.linear(h, weight, layer.base.bias)
        close(y, h)


def test_a_convolution_has_a_low_rank_kernel() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3, stride=2, padding=2, dilation=2)
    model = Adapted(conv, {"a": nn.Identity()}, [lora(2, 2.0)])
    own = model.encoder.specific["a"]
    nn.init.normal_(own.up.weight)
    kernel = torch.einsum("or,rihw->oihw", own.up.weight[:, :, 0, 0], own.down.weight)
    x = picture()
    close(model(x)["a"], conv(x) + functional.conv2d(x, kernel, None, 2, 2, 2))


def test_modulations_are_the_written_formulas() -> None:
    x, trunk = normal(4, 3, 5, 5), nn.Conv2d(3, 8, 1)
    for rule, formula in (
        (bottleneck("", 2, torch.tanh), lambda m, h: h + m.up(torch.tanh(m.down(h)))),
        (film(""), lambda m, h: (1 + m.scale) * h + m.shift),
        (
            squeeze_excite("", 2),
            lambda m, h: (
                h
                * 2
                * torch.sigmoid(m.excite(torch.relu(m.squeeze(h.mean((1, 2))))))[:, None, None]
            ),
        ),
    ):
        model = Adapted(trunk, {"a": nn.Identity()}, [rule])
        own = model.encoder.specific["a"]
        for parameter in own.parameters():
            nn.init.normal_(parameter)
        close(model(x)["a"], formula(own, trunk(x).movedim(1, -1)).movedim(-1, 1))


def test_a_frozen_trunk_keeps_its_statistics_and_tasks_have_their_own() -> None:
    x = picture()
    frozen = adapted(film("4")).train()
    before = frozen.encoder[1].running_mean.clone()
    frozen(x)
    assert torch.equal(frozen.encoder[1].running_mean, before)
    own = adapted(norm_per_task()).train()
    own(x, ["a"])
    norms = own.encoder[1].specific
    assert not torch.equal(norms["a"].running_mean, norms["b"].running_mean)
    assert own.train(False).encoder[1].specific["a"].training is False


def test_some_of_the_trunk_may_learn() -> None:
    model = adapted(film("4"), train=r"^1\.")
    assert {n for n, p in model.encoder.named_parameters() if p.requires_grad} == {
        "1.weight",
        "1.bias",
        *(f"4.specific.{t}.{n}" for t in "ab" for n in ("scale", "shift")),
    }
    names = {
        n for n, p in model.named_parameters() if any(p is q for q in model.shared_parameters())
    }
    assert names == {"encoder.1.weight", "encoder.1.bias"}


def test_transformer_layers_are_adapted_in_evaluation_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = Adapted(layer, {"a": nn.Identity()}, [lora(2)]).eval()
    x = normal(2, 5, 8)
    close(model(x)["a"], layer.eval()(x))
    nn.init.normal_(model.encoder.linear1.specific["a"].up.weight)
    with torch.no_grad():
        assert not torch.allclose(model(x)["a"], layer(x))


# ---------------------------------------------------------------------- AdaShare


def residual_blocks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(3, 8), Residual(8), Residual(8), Residual(8)]


def fixed(model: AdaShare, **rows: str) -> dict[str, Tensor]:
    """Return choices from a letter per block: r to run, s to skip."""
    index = {"r": 0, "s": 2}
    return {t: torch.eye(3)[[index[letter] for letter in row]] for t, row in rows.items()}


def test_all_blocks_run_are_hard_sharing_and_none_is_the_stem() -> None:
    blocks, tops, x = residual_blocks(), towers("a", "b", sizes=(8, 1)), normal(4, 3)
    model = AdaShare(blocks, tops, x)
    feats = model.encode(x, choices=fixed(model, a="rrrr", b="rsss"))
    shared = HPS(blocks, tops).encode(x).per_task["a"]
    assert torch.equal(feats.per_task["a"], shared)
    assert torch.equal(feats.per_task["b"], blocks[0](x))
    lowered = model.lower(fixed(model, a="rrsr", b="rsrr"))
    sets = lowered.parameter_task_sets()
    assert {frozenset(s) for n, s in sets.items() if "network" in n} == {
        frozenset("ab"),
        frozenset("a"),
        frozenset("b"),
    }
    assert len(list(lowered.network.parameters())) == 2 * 4


def test_penalties_of_running() -> None:
    x, tops = normal(4, 3), towers("a", "b", sizes=(8, 1))
    model = AdaShare(residual_blocks(), tops, x, regulariser=RunOrSkip(1.0, 1.0))
    sample = model.policy.sample()
    log2 = torch.tensor(2.0).log()
    close(model.regulariser(sample, model.policy), 2 * log2)  # even at the start, for two tasks
    with torch.no_grad():
        model.policy.logits["a"][2, 0] += 1.5
    apart = 1.5 * 3 / 4  # the third block of four
    skip = torch.tensor([1.5, 0.0]).log_softmax(0)[1]
    close(model.regulariser(sample, model.policy), 2 * log2 - (skip + log2) / 3 + apart)
    lower = RunOrSkip(0.0, 1.0, upper=False)
    close(lower(sample, model.policy), torch.tensor(1.5 * 2 / 4))


def test_a_curriculum_frees_the_last_blocks() -> None:
    x, tops = normal(4, 3), towers("a", "b", sizes=(8, 1))
    model = AdaShare(residual_blocks(), tops, x, regulariser=RunOrSkip(0.1, 0.0))
    model.policy.free_last(1)
    sample = model.policy.sample()
    assert all((rows[:3, 0] == 1).all() for rows in sample.values())
    y, aux = model(x, return_aux=True)
    (y["a"].sum() + sum(aux.values())).backward()
    slopes = model.policy.logits["a"].grad
    assert (slopes[:3] == 0).all()
    assert (slopes[3, [0, 2]] != 0).all()


def test_a_block_that_may_be_skipped_is_needed() -> None:
    sentence = (
        "AdaShare: `blocks` must hold at least one that keeps its shape, got none that a task may "
        "skip."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        AdaShare([nn.Linear(3, 8)], towers("a"), normal(4, 3))


# ---------------------------------------------------------------------- sparse experts


def route(layer: SparseMoE, weight: Tensor, name: str = "all") -> None:
    with torch.no_grad():
        layer.routers[name].weight.copy_(weight)


LOGITS = torch.tensor([[1.0, 2, 0, -1], [0, 0, 3, 1], [2, 0, 1, 1]])


@pytest.mark.parametrize(("k", "balance"), [(1, 1.18299), (2, 2.18008 / 2)])
def test_balance_and_z_losses(k: int, balance: float) -> None:
    layer = SparseMoE(lambda: nn.Linear(4, 4), 4, n=4, k=k, balance_weight=1.0, z_weight=1.0)
    route(layer, torch.eye(4))
    _, aux = layer(LOGITS)
    close(aux["balance"].item(), balance, rtol=1e-5, atol=0)
    close(aux["z"].item(), 7.72122, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("k", "normalise"), [(1, False), (2, False), (2, True), (3, False), (3, True)]
)
def test_tokens_get_their_likeliest_experts(k: int, normalise: bool) -> None:
    torch.manual_seed(0)
    layer, x = SparseMoE(expert, 8, n=3, k=k, normalise=normalise), normal(4, 5, 8)
    y, _ = layer(x)
    for b in range(4):
        for t in range(5):
            shares = torch.softmax(layer.routers["all"](x[b, t]), 0)
            best = shares.argsort(descending=True)[:k]
            total = shares[best].sum() if normalise else 1.0
            wanted = sum(shares[e] / total * layer.experts[e](x[b, t]) for e in best)
            close(y[b, t], wanted)


def test_one_expert_or_equal_ones_are_a_dense_layer() -> None:
    torch.manual_seed(0)
    only, x = expert(), normal(4, 5, 8)
    close(SparseMoE(lambda: only, 8, n=1, k=1, normalise=False)(x)[0], only(x))
    close(SparseMoE(lambda: only, 8, n=3, k=2)(x)[0], only(x))


def test_a_graph_computes_what_the_sparse_way_does() -> None:
    torch.manual_seed(0)
    layer, x = SparseMoE(expert, 8, n=4, k=2), normal(4, 5, 8)
    exported = torch.export.export(layer, (x,)).module()
    close(exported(x)[0], layer(x)[0])


def test_padding_is_routed_nowhere() -> None:
    torch.manual_seed(0)
    layer, x = SparseMoE(expert, 8, n=4, k=2, z_weight=1.0), normal(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    y, aux = layer(x, mask)
    assert (y[1, 2:] == 0).all()
    other = x.clone()
    other[1, 2:] = 100.0
    y2, aux2 = layer(other, mask)
    close(y2, y)
    close(aux2, aux)
    assert all(loss == 0 for loss in layer(x, 0 * mask)[1].values())


def test_experts_without_tokens_have_a_gradient_of_zero() -> None:
    layer = SparseMoE(lambda: nn.Linear(4, 4), 4, n=4, k=1)
    route(layer, torch.eye(4))
    layer(LOGITS[:1])[0].sum().backward()
    assert (layer.experts[0].weight.grad == 0).all()
    assert (layer.experts[1].weight.grad != 0).any()


def test_every_task_has_its_router() -> None:
    model = make("TaskRouted")[0]
    sets = model.parameter_task_sets()
    assert sets["stages.1.moe.routers.a.weight"] == {"a"}
    assert sets["stages.1.moe.experts.0.0.weight"] == {"a", "b"}
    with pytest.raises(ValueError, match=r"^SparseMoE: `task` must be among 'a', 'b', got None\.$"):
        model.stages[1].moe(normal(2, 5, 8))


def test_task_dependence() -> None:
    apart = {t: torch.eye(3)[i : i + 1] for i, t in enumerate(HEADS)}
    close(task_dependence(apart), torch.tensor(3.0).log())
    rows = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.25, 0.25, 0.5]])
    close(task_dependence({"a": rows[:1], "b": rows[1:]}).item(), 0.34657, rtol=0, atol=1e-5)
    close(task_dependence({"a": rows[:1], "b": rows[:1]}).item(), 0.0, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- groups


def test_affinities_are_those_of_small_steps() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(normal(6).double())
    goals = normal(3, 6, seed=1).double()

    def losses() -> dict[str, Tensor]:
        return {t: (weight - goal).square().sum() for t, goal in zip("abc", goals, strict=True)}

    found = losses()
    rows = torch.stack([torch.autograd.grad(y, weight)[0] for y in losses().values()])
    affinity = TaskAffinity("abc")
    for _ in range(2):
        affinity.update(rows @ rows.T, torch.stack(list(found.values())), 1e-5)
    before = weight.detach().clone()
    exact = lookahead_affinity(losses, [weight], 1e-5)
    assert torch.equal(weight, before)
    close(exact.float(), affinity.matrix, rtol=1e-3, atol=0)


def test_groups_are_the_best_of_all() -> None:
    matrix = normal(4, 4)
    names = "abcd"

    def score(groups: list[tuple[str, ...]]) -> float:
        total = 0.0
        for task in names:
            own = [
                sum(matrix[names.index(s), names.index(task)].item() for s in g if s != task)
                / max(1, len(g) - 1)
                for g in groups
                if task in g
            ]
            total += max(own)
        return total

    subsets = [g for n in range(1, 5) for g in combinations(names, n)]
    for budget in (1, 2, 3):
        covers = [
            list(groups)
            for n in range(1, budget + 1)
            for groups in combinations(subsets, n)
            if set().union(*groups) == set(names)
        ]
        best = max(map(score, covers))
        found = group_tasks(matrix, names, budget)
        assert len(found) <= budget
        close(score(found), best)
    assert group_tasks(matrix, names, 1) == [tuple(names)]


def test_groups_become_a_tree() -> None:
    model = grouped([nn.Linear(3, 8), perceptron(8, 8)], heads(), [("a", "c"), ("b",)])
    sets = model.parameter_task_sets()
    assert sets["nodes.0.0.weight"] == {"a", "c"}
    assert sets["nodes.0.1.weight"] == {"b"}
    sentence = "grouped: `groups` must hold every task, got none with 'c'."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        grouped([nn.Linear(3, 8)], heads(), [("a", "b")])


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "mix": (
        lambda: CrossStitch(networks(), heads(), mix="sum"),
        "CrossStitch: `mix` must be 'stitch' or 'nddr', got 'sum'.",
    ),
    "subspaces": (
        lambda: CrossStitch(networks(), heads(), subspaces=2),
        "CrossStitch: `subspaces` must be 1, or more with `granularity='layer'` and "
        "`mix='stitch'`, got 2.",
    ),
    "orthogonality": (
        lambda: CrossStitch(networks(), heads(), orthogonality_weight=1.0),
        "CrossStitch: `orthogonality_weight` must be >= 0, and 0 without subspaces, got 1.0.",
    ),
    "odd channels": (
        lambda: CrossStitch(networks(), heads(), granularity="layer", subspaces=3)(normal(2, 3)),
        "CrossStitch: `subspaces` must divide the channels of every stage, got 3 for 8.",
    ),
    "rank": (
        lambda: lora(0),
        "lora: `rank` must be >= 1 and `shared_rank` >= 0, got 0 and 0.",
    ),
    "nothing attached": (
        lambda: adapted(film("9")),
        "Adapted: `rules` must attach something to the encoder, got nothing.",
    ),
    "no width": (
        lambda: adapted(film("2")),
        "Adapted: `names` must match modules with a layer of known width, got ReLU.",
    ),
    "k of experts": (
        lambda: SparseMoE(expert, 8, n=3, k=4),
        "SparseMoE: `k` must be between 1 and `n` = 3, and above 1 where weights are normalised, "
        "got 4.",
    ),
    "one normalised": (
        lambda: SparseMoE(expert, 8, n=3, k=1, normalise=True),
        "SparseMoE: `k` must be between 1 and `n` = 3, and above 1 where weights are normalised, "
        "got 1.",
    ),
    "budget": (
        lambda: group_tasks(torch.eye(2), "abc", 1),
        "group_tasks: `affinity` must have shape [3, 3] and `budget` be >= 1, got [2, 2] and 1.",
    ),
    "loss of zero": (
        lambda: TaskAffinity("ab").update(torch.eye(2), torch.zeros(2), 0.1),
        "TaskAffinity: `losses` must be > 0, got [0.0, 0.0].",
    ),
    "split": (
        lambda: grouped([nn.Linear(3, 8)], heads(), [HEADS], split_at=2),
        "grouped: `split_at` must be between 0 and 1 stages, got 2.",
    ),
    "sharing": (lambda: RunOrSkip(sharing=-1.0), "RunOrSkip: `sharing` must be >= 0, got -1.0."),
}


@pytest.mark.parametrize(("call", "sentence"), ERRORS.values(), ids=ERRORS)
def test_bad_values(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call()


def test_a_batch_that_cannot_be_repeated_takes_a_pass_per_task() -> None:
    class Take(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 8)

        def forward(self, x: object) -> Tensor:
            return self.linear(x.features)  # type: ignore[attr-defined,no-any-return]

    class Box:
        features = normal(4, 3)

    tops = {name: nn.Identity() for name in "ab"}
    model = Adapted(Take(), tops, [lora(2)])
    with torch.no_grad():
        assert model(Box())["b"].shape == (4, 8)
    model.batched = True
    sentence = (
        "Adapted: `batched` must be None or False for a batch that holds more than tensors, which "
        "cannot be repeated, got Box."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        model(Box())


class Reader(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.linear.weight)


def test_a_layer_that_is_not_called_cannot_be_adapted() -> None:
    sentence = (
        "Adapted: `weight` of a layer is read by a module that does not call the layer, so nothing "
        "can be attached to it. Leave it out by `names`."
    )
    with pytest.raises(AttributeError, match=f"^{re.escape(sentence)}$"):
        Adapted(Reader(), {"a": nn.Identity()}, [lora(2)])(normal(2, 3))


def test_a_layer_of_tasks_alone_says_what_to_do() -> None:
    model = adapted(film("4"))
    with pytest.raises(RuntimeError, match=r"^Adapted: a layer with modules of tasks must run"):
        model.encoder(picture())


def test_a_checkpoint_cannot_recompute_what_is_of_a_task() -> None:
    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]

    model = Adapted(Saved(), {"a": nn.Identity()}, [lora(2)])
    y = model(normal(2, 3))["a"]
    with pytest.raises(RuntimeError, match=r"^Adapted: a layer with modules of tasks must run"):
        y.sum().backward()
