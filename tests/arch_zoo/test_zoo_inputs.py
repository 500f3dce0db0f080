"""What may enter a model: any batch, one per task, named inputs, and structures of features."""

import re
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_cases import Kit, assert_sets

from arch_zoo import (
    CGC,
    HPS,
    MTAN,
    PLE,
    CrossStitch,
    Decoded,
    Decoder,
    Gate,
    LearningToBranch,
    MMoE,
    OneBatch,
    PerTask,
    Prediction,
    task_losses,
)
from arch_zoo.tensors import pooled

HEADS = ("a", "b")


class Embed(nn.Module):
    """Features of a dict batch: numbers and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.dense = nn.Embedding(10, 8), nn.Linear(3, 8)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        assert type(batch) is dict
        return self.users(batch["user"]) + self.dense(batch["dense"])  # type: ignore[no-any-return]


def batch(n: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "user": torch.randint(0, 10, (n,), generator=generator),
        "dense": torch.randn(n, 3, generator=generator),
    }


class Text(nn.Module):
    """Token features that see the mean of the tokens that the mask keeps."""

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8) if vocabulary else nn.Identity()
        self.linear = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.linear(x + pooled(x, attention_mask, "NLC")[:, None]).tanh()  # type: ignore[no-any-return]


class MaskedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.linear(pooled(x, attention_mask, "NLC"))  # type: ignore[no-any-return]


def linear_heads() -> dict[str, nn.Module]:
    return {name: nn.Linear(8, 1) for name in HEADS}


def masked_heads() -> dict[str, nn.Module]:
    return {name: MaskedHead() for name in HEADS}


TEXT_MODELS = {
    "HPS": lambda: HPS([Text(20), Text()], masked_heads()),
    "CrossStitch": lambda: CrossStitch([Text(20), Text()], masked_heads()),
    "MMoE": lambda: MMoE(Text, masked_heads(), num_experts=2, stem=Text(20)),
    "CGC": lambda: CGC(lambda: Text(20), masked_heads(), num_shared=1, num_specific=1, gate=ONES),
    "PLE": lambda: PLE([Text, Text], masked_heads(), num_shared=1, num_specific=1, stem=Text(20)),
    "LearningToBranch": lambda: LearningToBranch([Text(20), Text()], masked_heads()),
    "MTAN": lambda: MTAN([(Text(20), Text())], masked_heads()),
}
ONES = Gate(lambda x: torch.ones(len(x if torch.is_tensor(x) else x["input_ids"]), 1))


def tokens(length: int = 6) -> dict[str, Tensor]:
    """Return the same two sentences, padded to a length."""
    ids = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    pad = (0, length - 5)
    return {
        "input_ids": nn.functional.pad(ids * mask, pad),
        "attention_mask": nn.functional.pad(mask, pad),
    }


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_padding_changes_nothing_that_heeds_the_mask(name: str) -> None:
    torch.manual_seed(0)
    model = TEXT_MODELS[name]().eval()
    if name == "MTAN":  # its masks look at single positions, so only the heads need the mask
        model.initialize(**tokens())
    model.initialize(**tokens())
    short, long = model(**tokens(6)), model(**tokens(9))
    torch.testing.assert_close(short, long)
    assert not torch.allclose(short["a"], model(tokens(6)["input_ids"])["a"])
    by_position = model(tokens()["input_ids"], attention_mask=tokens()["attention_mask"])
    torch.testing.assert_close(by_position, short)


def test_named_inputs_per_task() -> None:
    model = TEXT_MODELS["HPS"]().eval()
    one, two = tokens(6), {k: v[:1] for k, v in tokens(8).items()}
    found = model(**PerTask.named(a=one, b=two))
    torch.testing.assert_close(found, {"a": model(**one)["a"], "b": model(**two)["b"]})
    assert list(model(**PerTask.named(b=two))) == ["b"]
    mask = tokens()["attention_mask"]
    shared_ids = model(one["input_ids"], attention_mask=PerTask(a=mask, b=torch.ones_like(mask)))
    torch.testing.assert_close(shared_ids["a"], model(**one)["a"])
    torch.testing.assert_close(shared_ids["b"], model(one["input_ids"])["b"])


def test_a_batch_is_any_mapping_without_tasks() -> None:
    model = HPS(Embed(), linear_heads())
    x = batch()
    expected = model.heads["a"](model.encoder(x))
    torch.testing.assert_close(model(x)["a"], expected)
    named = HPS(Embed(), {"user": nn.Linear(8, 1), "dense": nn.Linear(8, 1)})
    assert named(OneBatch(x)).keys() == {"user", "dense"}
    per_task = model({"a": x, "b": batch(2, 1)})
    assert {name: len(y) for name, y in per_task.items()} == {"a": 4, "b": 2}


def test_a_foreign_mapping_is_a_batch_too() -> None:
    class Take(nn.Module):
        def forward(self, x: UserDict[str, Tensor]) -> Tensor:
            return x["dense"]

    model = HPS(Take(), {name: nn.Linear(3, 1) for name in HEADS})
    assert model(UserDict(batch()))["a"].shape == (4, 1)


def test_equal_batches_run_once() -> None:
    calls = []
    model = HPS(Embed(), linear_heads())
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    x = batch()
    model({"a": dict(x), "b": dict(x)})
    assert len(calls) == 1
    model({"a": x, "b": batch()})
    assert len(calls) == 3


def test_experts_read_a_dict_batch_and_gates_what_they_are_told() -> None:
    gate = Gate(lambda b: b["dense"])
    model = MMoE(Embed, linear_heads(), num_experts=3, gate=gate).initialize(batch())
    assert model(batch())["a"].shape == (4, 1)
    sentence = (
        "Gate: `input` 'pool' must read a tensor, got dict. Put a `stem` below, pass a function of "
        "the batch, or read 'given'."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        MMoE(Embed, linear_heads(), num_experts=3)(batch())


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_what_nothing_takes_is_an_error(name: str) -> None:
    sentence = f"{name}: `positions` is named by the `forward` of no stage and of no head."
    with pytest.raises(TypeError, match=re.escape(sentence)):
        TEXT_MODELS[name]()(tokens()["input_ids"], positions=torch.ones(1))


def test_a_mask_of_another_shape_is_an_error() -> None:
    model = MMoE(nn.Identity, linear_heads(), num_experts=2)
    sentence = (
        "Gate: `attention_mask` must have the shape of the positions, [2, 5], got [2, 1, 1, 5]."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        model(torch.ones(2, 5, 8), attention_mask=torch.ones(2, 1, 1, 5))


class Pyramid(nn.Module):
    """Two maps, the second made from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low(x).tanh()
        return {"low": low, "high": self.high(low)}


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 1)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        joined = torch.cat([pooled(x["low"]), pooled(x["high"])], dim=1)
        return self.linear(joined)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["HPS", "MMoE", "CGC", "LearningToBranch"])
def test_features_may_be_a_pyramid(name: str) -> None:
    torch.manual_seed(0)
    heads = {task: Both() for task in HEADS}
    models = {
        "HPS": lambda: HPS(Pyramid(), heads),
        "MMoE": lambda: MMoE(Pyramid, heads, num_experts=2),
        "CGC": lambda: CGC(Pyramid, heads, num_shared=1, num_specific=1),
        "LearningToBranch": lambda: LearningToBranch([Pyramid], heads),
    }
    model, x = models[name](), torch.randn(2, 3, 9, 9)
    model.initialize(x)
    assert_sets(model, model(x))
    feats = model.encode(x)
    if name in ("HPS", "MMoE"):  # the rule of a representation: one pass from the cut down
        shared = list(model.shared_parameters())
        loss = model.decode(feats)["a"].sin().sum()
        direct = torch.autograd.grad(loss, shared, retain_graph=True)
        at_cut = torch.autograd.grad(loss, feats.shared, retain_graph=True)
        below = torch.autograd.grad(feats.shared, shared, at_cut)
        torch.testing.assert_close(below, direct)


class Chained(Decoder):
    """Task b reads its own stream and that of a, detached or not, and helps an output c."""

    def __init__(self, detach: bool) -> None:
        super().__init__(("a", "b"))
        self.detach = detach
        self.first, self.second = nn.Linear(8, 1), nn.Linear(16, 1)

    def sources(self, task: str) -> tuple[str, ...]:
        return ("a",) if task == "a" else ("a", "b")

    def gradients(self, task: str) -> tuple[str, ...]:
        return (task,) if self.detach else self.sources(task)

    def reach(self) -> Iterator[tuple[nn.Module, Sequence[str]]]:
        yield self.first, ("a",)
        yield self.second, ("b",)

    def forward(self, streams: Mapping[str, Any], tasks: Sequence[str], **named: Any) -> Decoded:
        outputs, predictions = {}, {}
        if "a" in tasks:
            outputs["a"] = self.first(streams["a"])
            predictions["a/again"] = Prediction("a", outputs["a"], 0.5)
        if "b" in tasks:
            first = streams["a"].detach() if self.detach else streams["a"]
            outputs["b"] = self.second(torch.cat([first, streams["b"]], 1))
            outputs["c"] = outputs["b"] * 2
        return Decoded(outputs, predictions)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("base", ["HPS", "CGC", "PLE", "CrossStitch", "LearningToBranch"])
def test_decoders_see_the_features_of_other_tasks(base: str, detach: bool) -> None:
    kit, heads = Kit("vector"), Chained(detach)
    torch.manual_seed(0)
    models = {
        "HPS": lambda: HPS(kit.stage, heads),
        "CGC": lambda: CGC(kit.stage, heads, num_shared=1, num_specific=1),
        "PLE": lambda: PLE(kit.factories(2), heads, num_shared=1, num_specific=1),
        "CrossStitch": lambda: CrossStitch(kit.factories(2), heads),
        "LearningToBranch": lambda: LearningToBranch(kit.factories(2), heads).eval(),
    }
    model = models[base]().initialize(kit.x())
    outputs = model(kit.x())
    assert list(outputs) == ["a", "b", "c"]
    if base == "HPS" and detach:
        model.eval()  # one stream for both tasks, of which one part is detached: still its own
    elif base != "LearningToBranch":
        assert_sets(model, {name: outputs[name] for name in model.tasks})
    assert list(model(kit.x(), ["a"])) == ["a"]
    torch.testing.assert_close(model(kit.x(), ["b"])["b"], outputs["b"])
    per_task = model({"a": kit.x(3, seed=1), "b": kit.x(2, seed=2)})
    assert [len(y) for y in per_task.values()] == [3, 2, 2]
    torch.testing.assert_close(per_task["b"], model(kit.x(2, seed=2), ["b"])["b"])


def test_a_result_has_predictions_and_a_loss_per_task() -> None:
    kit = Kit("vector")
    model = HPS(kit.stage, Chained(False))
    result = model.run(kit.x())
    assert result.predictions["a/again"].task == "a"
    zeros = {name: torch.zeros(4, 1) for name in "ab"}
    losses = task_losses(result, dict.fromkeys("ab", nn.functional.mse_loss), zeros)
    torch.testing.assert_close(losses["a"], 1.5 * result.outputs["a"].square().mean())
    assert list(losses) == ["a", "b"]
    sentence = "task_losses: `criteria` must hold one for every target, got none for 'b'."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        task_losses(result, {"a": nn.functional.mse_loss}, zeros)


def test_frozen_parameters_are_neither_shared_nor_of_a_task() -> None:
    model = HPS(nn.Linear(3, 8), linear_heads())
    model.encoder.requires_grad_(False)
    assert list(model.shared_parameters()) == []
    assert model.parameter_task_sets()["encoder.weight"] == {"a", "b"}
