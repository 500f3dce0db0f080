"""What models cost, against counts by hand."""

import pytest
import torch
from backbones import WIDTH, backbone, pictures
from torch import Tensor, nn

from arch_zoo import ESMM, HPS
from arch_zoo.automtl.costs import Cost, latencies, model_cost
from arch_zoo.automtl.table import beside, cost_table
from arch_zoo.encoders import Encoder
from arch_zoo.tensors import pooled


class Head(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pooled(x))


def model_of(encoder: Encoder) -> HPS:
    return HPS(encoder, {"a": Head(WIDTH, 2), "b": Head(WIDTH, 3)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "operations"),
    [
        (nn.Conv2d(3, 4, 3, stride=2), 12 * 4 * 27),  # 9 x 8 -> 4 x 3
        (nn.Conv2d(3, 3, 3, padding=1, groups=3), 72 * 3 * 9),
        (nn.ConvTranspose2d(3, 6, 2, stride=2), 72 * 3 * 6 * 4),
        (nn.Conv2d(3, 2, (1, 3), dilation=2), 36 * 2 * 9),  # -> 9 x 4
        (nn.ReLU(inplace=True), 0),
        (nn.Sequential(nn.Flatten(), nn.Linear(216, 5)), 216 * 5),
    ],
)
def test_operations_are_those_of_the_definition(layer: nn.Module, operations: int) -> None:
    size = sum(parameter.numel() for parameter in layer.parameters())
    assert model_cost(layer, torch.zeros(7, 3, 9, 8)) == Cost(size, operations)


def test_a_module_called_twice_has_its_parameters_once_and_its_operations_twice() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    x = torch.zeros(1, 3, 5, 5)
    assert model_cost(nn.Sequential(layer, layer), x) == Cost(84, 2 * 25 * 81)


def test_attention_is_counted() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    per_token = 4 * 8 * 8 + 2 * 8 * 16
    found = model_cost(block, torch.zeros(2, 5, 8))
    assert found.operations == 5 * per_token + 2 * 5 * 5 * 8


def test_counting_and_timing_change_nothing() -> None:
    model = model_of(backbone("ResNet"))
    model.encoder.get_submodule("bn1").eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model_cost(model, pictures())
    assert latencies({"model": model}, pictures(), rounds=2)["model"] > 0
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_one_batch_per_task_runs_once_per_batch() -> None:
    model = model_of(nn.Conv2d(3, WIDTH, 1))
    x = pictures(4)
    once = model_cost(model, x).operations
    assert model_cost(model, {"a": x, "b": x}).operations == once
    assert model_cost(model, {"a": x, "b": x + 1}).operations == once + 20 * 17 * 3 * WIDTH


def test_the_table_has_a_row_per_model_against_the_first() -> None:
    encoder = [nn.Conv2d(3, WIDTH, 1), nn.ReLU()]
    models = beside(model_of(encoder), encoder)
    assert list(models) == ["2 networks", "hard sharing", "HPS"]
    whole, heads = 20 * 17 * 3 * WIDTH, 5 * WIDTH
    for model, n in zip(models.values(), (2, 1, 1), strict=True):
        assert model_cost(model, pictures()) == Cost(n * 64 + 5 * 17, n * whole + heads)
    assert {id(p) for p in models["hard sharing"].parameters()}.isdisjoint(
        id(p) for p in models["HPS"].parameters()
    )
    assert cost_table(models, pictures(), rounds=0).splitlines() == [
        "| model | parameters | operations |",
        "|---|--:|--:|",
        "| 2 networks | 213 (1.00) | 32,720 (1.00) |",
        "| hard sharing | 149 (0.70) | 16,400 (0.50) |",
        "| HPS | 149 (0.70) | 16,400 (0.50) |",
    ]


def test_heads_that_read_each_other_go_into_the_table() -> None:
    encoder, towers = nn.Linear(4, 8), (nn.Linear(8, 1), nn.Linear(8, 1))
    models = beside(ESMM(encoder, *towers), encoder)
    assert list(models) == ["2 networks", "hard sharing", "ESMM"]
    for model, n in zip(models.values(), (2, 1, 1), strict=True):
        assert model_cost(model, torch.zeros(3, 4)) == Cost(n * 40 + 2 * 9, n * 32 + 2 * 8)


def test_the_table_may_tell_the_time_and_has_no_ratio_to_nothing() -> None:
    lines = cost_table({"a": nn.ReLU(), "b": nn.Linear(3, 1)}, torch.zeros(2, 3), rounds=1)
    head, _, first, second = lines.splitlines()
    assert head == "| model | parameters | operations | time |"
    assert first == "| a | 0 (-) | 0 (-) | 1.00 |"
    assert second.startswith("| b | 4 (-) | 3 (-) | ")
