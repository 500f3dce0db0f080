"""How a supermodel of AutoMTL is put together: operators, branches, costs, what is refused."""

import pytest
import torch
from automtl_cases import SOME, all_take, build, heads, images, perturb, same
from backbones import backbone, pictures
from torch import Tensor, nn

from arch_zoo import AutoMTL
from arch_zoo.automtl import effective_sharing, partners, split_at

each = pytest.mark.parametrize("name", SOME)


@each
def test_every_convolution_of_a_map_is_an_operator(name: str) -> None:
    model = build(name)
    network = backbone(name)
    convolutions = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(model.operators) == {n for n in convolutions if "fc" not in n}
    assert model.policy.legal.all()
    first, last = model.policy.depth[0], model.policy.depth.max()
    assert (first, last) == (1, len(model.operators) - (name == "ResNet"))  # one shortcut


def test_depth_is_the_longest_chain_of_operators() -> None:
    model = build("ResNet")
    depth = dict(zip(model.operators, model.policy.depth.tolist(), strict=True))
    assert depth["conv1"] == 1
    assert depth["layer2.0.shortcut.0"] == depth["layer2.0.conv1"] == 6
    assert depth["layer2.1.conv1"] == 8


def test_costs_of_branches() -> None:
    model = build("ResNet")
    number = model.operators.index("layer2.0.conv1")  # 8 to 16 channels, halves 10 x 9 positions
    assert model.policy.sizes[number].tolist() == [8 * 16 * 9, 8 * 16 * 9, 8 * 16 + 2 * 16]
    per_position = torch.tensor([8 * 16 * 9, 8 * 16 * 9, 8 * 16])
    assert model.policy.operations[number].tolist() == (25 * per_position).tolist()
    kept = model.operators.index("layer1.0.conv1")
    assert model.policy.sizes[kept].tolist()[2] == 0


@pytest.mark.parametrize(("skip", "legal"), [("geometry", 10), ("identity", 7), ("off", 0)])
def test_skips_that_do_not_fit_are_masked(skip: str, legal: int) -> None:
    model = build("ResNet", skip=skip)
    assert model.policy.legal[:, 2].sum() == legal
    assert model.policy.legal[:, :2].all()
    model.policy.tau.steps.fill_(5_000)
    outputs, aux = model(images(), return_aux=True)
    torch.stack([*(y.sum() for y in outputs.values()), aux["policy"]]).sum().backward()
    for logits in model.policy.logits.values():
        assert logits.grad.isfinite().all()
        assert (logits.grad[~model.policy.legal] == 0).all()


def test_a_convolution_padded_beyond_half_its_window_cannot_be_skipped() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1, padding=1), nn.Conv2d(4, 16, 3, padding=2))
    assert AutoMTL(network, heads(), pictures()).policy.legal[:, 2].tolist() == [False, False]


def test_searchable_decides() -> None:
    def pointwise(node: object, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)

    model = build("EfficientNet", searchable=pointwise)
    assert len(model.operators) == 7 + 6  # those of squeeze-excite, too
    low = model.lower(all_take(model, "specific"))
    assert len(list(low.shared_parameters())) > 0


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.stem = nn.Conv2d(3, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.stem(x)))
        return self.norm(self.conv(y.relu()))  # type: ignore[no-any-return]


def test_a_module_called_twice_has_one_decision() -> None:
    model = AutoMTL(Twice().double(), heads(), images()).double()
    perturb(model)
    assert model.operators == ("stem", "conv")
    assert model.policy.depth.tolist() == [1, 2]
    choices = all_take(model, "shared")
    choices["b"][1] = choices["c"][1] = torch.tensor([0.0, 1.0, 0.0])
    low = model.eval().lower(choices)
    same(low(images()), model(images(), choices=choices))
    kept = {n for n, _ in low.network.named_parameters() if n.startswith("conv.") and "bias" in n}
    assert kept == {"conv.shared.bias", "conv.specific.b.bias", "conv.specific.c.bias"}
    one = sum(p.numel() for p in Twice().parameters())
    only = model.lower(all_take(model, "shared"))
    assert sum(p.numel() for p in only.network.parameters()) == one
    separate = model.lower(all_take(model, "specific"))
    assert sum(p.numel() for p in separate.network.parameters()) == 3 * one


class Scaled(nn.Module):
    """Reads parameters and buffers of its own, some under a name that a module might take."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 16, 3))
        self.block_0 = nn.Parameter(torch.full((16, 1, 1), 2.0))
        self.register_buffer("offset", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * self.block_0 + self.offset


def test_parameters_outside_modules_are_shared() -> None:
    model = AutoMTL(Scaled(), heads("ab"), pictures())
    sets = model.parameter_task_sets()
    assert [sets[n] for n, p in model.named_parameters() if p.shape == (16, 1, 1)] == [{"a", "b"}]
    low = model.eval().lower(all_take(model, "specific"))
    same(low(pictures()), model(pictures(), choices=all_take(model, "specific")))
    found = list(low.shared_parameters())
    assert [tuple(p.shape) for p in found] == [(16, 1, 1)]
    assert [tuple(b.shape) for b in low.buffers()] == [(1,)]


def test_a_list_of_blocks_is_searched_as_wholes() -> None:
    blocks = [
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    ]
    tasks = {task: nn.Linear(8, 1) for task in "ab"}
    x = torch.randn(3, 4, 5)
    model = AutoMTL(blocks, tasks, x)
    assert model.operators == ("0", "1")
    assert model.policy.legal[:, 2].tolist() == [False, True]
    choices = {task: torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]) for task in "ab"}
    choices["b"][1] = torch.tensor([0.0, 1.0, 0.0])
    same(model.lower(choices)(x), model(x, choices=choices))
    torch.testing.assert_close(model.lower(choices).encode(x).per_task["a"], blocks[0](x))


# ---------------------------------------------------------------------- errors

FEW = "AutoMTL: `searchable` must hold for at least one module of `backbone` that is called with "


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"norm": "both"}, "AutoMTL: `norm` must be among 'shared', 'task', got 'both'."),
        ({"skip": "on"}, "AutoMTL: `skip` must be among 'geometry', 'identity', 'off', got 'on'."),
        ({"searchable": lambda node, module: False}, f"{FEW}one input, got none."),
    ],
)
def test_options_are_told(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + sentence.replace(".", r"\.") + "$"):
        build("ResNet", **options)


def test_choices_are_checked() -> None:
    model = build("ResNet", "ab", skip="off")
    soft, illegal = model.policy.sample(), all_take(model, "skip")
    short = {task: rows[:3] for task, rows in all_take(model, "shared").items()}
    for choices in (soft, illegal, short):
        with pytest.raises(
            ValueError,
            match=(
                r"^AutoMTL: `choices` must hold one-hot rows of legal branches, shape \[10, 3\], "
                r"got other ones for 'a'\. `policy\.draw\(\)` makes some\.$"
            ),
        ):
            model.lower(choices)
    with pytest.raises(ValueError, match=r"got none for 'b'"):
        model(images(), choices={"a": soft["a"]})
    with pytest.raises(ValueError, match=r"one-hot rows .*, got none for 'b'"):
        model.lower({"a": model.policy.argmax()["a"]})


def test_a_lone_share_is_a_copy() -> None:
    rows = torch.eye(3)
    choices = {"a": rows[[0, 0, 0]], "b": rows[[0, 1, 2]], "c": rows[[0, 0, 1]]}
    assert partners(choices)["a"] == [("b", "c"), ("c",), ()]
    assert partners(choices)["b"] == [("a", "c"), (), ()]
    assert effective_sharing(choices) == {"a": 2 / 3, "b": 1 / 3, "c": 2 / 3}


def test_a_split_needs_no_search() -> None:
    model = build("ResNet")
    like = next(model.architecture_parameters())
    for n in (0, 3, len(model.operators)):
        choices = split_at(n, len(model.operators), model.tasks, like)
        lowered = model.lower(choices)
        assert all(
            share == n / len(model.operators) for share in effective_sharing(choices).values()
        )
        shared = {name for name, tasks in lowered.parameter_task_sets().items() if len(tasks) > 1}
        assert bool(shared) == (n > 0)
    with pytest.raises(ValueError, match=r"^split_at: `n` must be between 0 and 10, got 11\.$"):
        split_at(11, 10, model.tasks, like)
