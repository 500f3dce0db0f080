"""Bad input: one clear sentence, in full."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from zoo_cases import Kit

from arch_zoo import (
    CGC,
    HPS,
    MTAN,
    PLE,
    CrossStitch,
    DSelectK,
    ExpertBank,
    Gate,
    LearningToBranch,
    MMoE,
    Schedule,
)

KIT = Kit("vector")
X = KIT.x()
HEADS = KIT.heads()
LAYER = nn.Linear(3, 8)


def hps() -> HPS:
    return HPS(LAYER, HEADS)


def named(name: object) -> Callable[[], object]:
    return lambda: HPS(LAYER, {name: nn.Identity()})  # type: ignore[dict-item]


def name_error(name: str) -> str:
    return (
        "HPS: `heads` must be named by non-empty strings without dots that are no attribute of "
        f"ModuleDict, got {name}. Rename the task."
    )


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 8))


mmoe = partial(MMoE, KIT.stage, HEADS)
cgc = partial(CGC, KIT.stage, HEADS)
selecting = partial(DSelectK, KIT.stage, HEADS, num_experts=3)
stitched = partial(CrossStitch, KIT.factories(3), HEADS)
branching = partial(LearningToBranch, KIT.factories(2), HEADS)

VALUE_ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "no task": (lambda: HPS(LAYER, {}), "HPS: `heads` must name at least one task, got none."),
    "dotted": (named("a.b"), name_error("'a.b'")),
    "taken": (named("keys"), name_error("'keys'")),
    "training": (named("training"), name_error("'training'")),
    "empty": (named(""), name_error("''")),
    "number": (named(3), name_error("3")),
    "unknown task": (
        lambda: HPS(LAYER, {"depth": LAYER, "normal": LAYER})(X, ["dept"]),
        "HPS: `tasks` must be among 'depth', 'normal', got 'dept'. Did you mean 'depth'?",
    ),
    "unknown batch": (
        lambda: hps()({"a": X, "zz": X}),
        "HPS: the keys of `x` must all be tasks, or none of them, got 'a', a task, and 'zz', which "
        "is none. Wrap it in `PerTask` or in `OneBatch`.",
    ),
    "missing batch": (
        lambda: hps()({"a": X}, ["a", "b"]),
        "HPS: `x` must hold a batch for every task of `tasks`, got none for 'b'.",
    ),
    "not encoded": (
        lambda: hps().decode(hps().encode(X, ["a"]), ["b"]),
        "HPS: `tasks` must be among 'a', got 'b'.",
    ),
    "unknown parameters": (
        lambda: hps().task_parameters("d"),
        "HPS: `task` must be among 'a', 'b', 'c', got 'd'.",
    ),
    "no experts": (lambda: mmoe(), "MMoE: `num_experts` must be >= 1, got None."),
    "zero experts": (lambda: mmoe(num_experts=0), "MMoE: `num_experts` must be >= 1, got 0."),
    "other bank": (
        lambda: MMoE(ExpertBank(KIT.stage, 2), HEADS, num_experts=3),
        "MMoE: `num_experts` must be 2, as many as there are, or left out, got 3.",
    ),
    "other list": (
        lambda: MMoE([LAYER], HEADS, num_experts=2),
        "MMoE: `num_experts` must be 1, as many as there are, or left out, got 2.",
    ),
    "gate input of others": (
        lambda: mmoe(num_experts=2, gate=Gate("given"))(X, gate_input={"a": X, "b": X}),
        "MMoE: `gate_input` must hold a batch for every task of `tasks`, got none for 'c'.",
    ),
    "task without expert": (
        lambda: cgc(num_shared=0, num_specific={"a": 1, "b": 0, "c": 1}),
        "CGC: `num_shared` and `num_specific` must be >= 0 and give every task an expert, "
        "got 0 shared and 0 for 'b'.",
    ),
    "task left out": (
        lambda: cgc(num_shared=1, num_specific={"a": 1, "c": 1}),
        "CGC: `num_shared` and `num_specific` must be >= 0 and give every task an expert, "
        "got 1 shared and None for 'b'.",
    ),
    "negative": (
        lambda: cgc(num_shared=-1, num_specific=2),
        "CGC: `num_shared` and `num_specific` must be >= 0 and give every task an expert, "
        "got -1 shared and 2 for 'a'.",
    ),
    "unknown specific": (
        lambda: cgc(num_shared=1, num_specific={"d": 1}),
        "CGC: `num_specific` must be among 'a', 'b', 'c', got 'd'.",
    ),
    "no level": (
        lambda: PLE([], HEADS, num_shared=1, num_specific=1),
        "PLE: `levels` must hold at least one factory of experts, got none.",
    ),
    "given missing": (
        lambda: mmoe(num_experts=2, gate=Gate("given"))(X),
        "Gate: `gate_input` must be passed to gates that read 'given'.",
    ),
    "given of no use": (
        lambda: mmoe(num_experts=2)(X, gate_input=X),
        "Gate: `gate_input` must be left out with gates that read 'pool'.",
    ),
    "gate": (
        lambda: Gate("mean"),
        "Gate: `input` must be 'pool', 'flatten', 'given' or a function, got 'mean'.",
    ),
    "k": (
        lambda: selecting(k=4),
        "DSelectK: `k` must be between 1 and `num_experts` = 3, got 4.",
    ),
    "gamma": (lambda: selecting(k=1, gamma=0.0), "DSelectK: `gamma` must be > 0, got 0.0."),
    "condition": (
        lambda: selecting(k=1, condition="batch"),
        "DSelectK: `condition` must be 'example' or 'task', got 'batch'.",
    ),
    "entropy": (
        lambda: selecting(k=1, entropy_weight=-1.0),
        "DSelectK: `entropy_weight` must be >= 0, got -1.0.",
    ),
    "leak": (
        lambda: selecting(k=1, leak_weight=float("nan")),
        "DSelectK: `leak_weight` must be >= 0, got nan.",
    ),
    "stitch after": (
        lambda: stitched(stitch_after={0, 3}),
        "CrossStitch: `stitch_after` must hold indices of stages, 0 to 2, got 3.",
    ),
    "granularity": (
        lambda: stitched(granularity="pixel"),
        "CrossStitch: `granularity` must be 'channel' or 'layer', got 'pixel'.",
    ),
    "self weight": (
        lambda: stitched(self_weight=1.5),
        "CrossStitch: `self_weight` must be between 0 and 1, got 1.5.",
    ),
    "network missing": (
        lambda: CrossStitch({"a": LAYER, "b": LAYER}, HEADS),
        "CrossStitch: `stages` must hold a network for every task, got none for 'c'.",
    ),
    "network too long": (
        lambda: CrossStitch({"a": LAYER, "b": LAYER, "c": [LAYER, LAYER]}, HEADS),
        "CrossStitch: `stages` must be as many for every task, got {'a': 1, 'b': 1, 'c': 2}.",
    ),
    "streams": (
        lambda: CrossStitch({"a": KIT.factories(2), "b": KIT.factories(2), "c": wide}, HEADS)(X),
        "CrossStitch: the outputs of `stages[0]` must have one shape, got [4, 8] of 'a', "
        "[4, 8] of 'b', [4, 9] of 'c'.",
    ),
    "nodes": (
        lambda: branching(nodes_per_stage=[2, 0]),
        "LearningToBranch: `nodes_per_stage` must be >= 1 for each of the 2 stages, got [2, 0].",
    ),
    "too few nodes": (
        lambda: branching(nodes_per_stage=[2]),
        "LearningToBranch: `nodes_per_stage` must be >= 1 for each of the 2 stages, got [2].",
    ),
    "node shapes": (
        lambda: LearningToBranch([iter([LAYER, wide()[0]]).__next__], HEADS, nodes_per_stage=2)(X),
        "LearningToBranch: the outputs of `stages[0]` must have one shape, got [4, 8] of node 0, "
        "[4, 9] of node 1.",
    ),
    "start": (lambda: Schedule(start=0.0), "Schedule: `start` must be finite and > 0, got 0.0."),
    "floor": (lambda: Schedule(floor=-1.0), "Schedule: `floor` must be finite and > 0, got -1.0."),
    "reduction": (
        lambda: MTAN(LAYER, HEADS, reduction=0),
        "MTAN: `reduction` must be >= 1, got 0.",
    ),
    "refine": (
        lambda: MTAN(LAYER, HEADS, refine="pool"),
        "MTAN: `refine` must be 'residual', 'conv' or None, got 'pool'.",
    ),
    "resize": (
        lambda: MTAN(LAYER, HEADS, resize="min"),
        "MTAN: `resize` must be 'auto', 'max', 'avg' or 'interp', or one of these for each of the "
        "1 stages, got 'min'.",
    ),
    "axes": (
        lambda: MTAN([nn.Identity(), nn.Flatten(2)], HEADS)(torch.ones(2, 3, 4, 5)),
        "MTAN: `stages[1]` must keep the number of axes or make vectors, got 3 axes after 4.",
    ),
    "bank of none": (lambda: ExpertBank(KIT.stage), "ExpertBank: `n` must be >= 1, got None."),
    "empty bank": (lambda: ExpertBank([]), "ExpertBank: `n` must be >= 1, got 0."),
    "bank size": (
        lambda: ExpertBank([LAYER], 2),
        "ExpertBank: `experts` must hold `n` = 2, got 1.",
    ),
    "backend": (
        lambda: ExpertBank(KIT.stage, 2, backend="map"),
        "ExpertBank: `backend` must be one of 'auto', 'loop', 'bmm', 'vmap', got 'map'.",
    ),
    "not perceptrons": (
        lambda: ExpertBank(lambda: nn.Conv2d(3, 3, 3), 2, backend="bmm"),
        "ExpertBank: `experts` must be perceptrons of one build for backend 'bmm', got "
        "['Conv2d', 'Conv2d']. Use 'loop'.",
    ),
    "not alike": (
        lambda: ExpertBank([LAYER, nn.Bilinear(2, 2, 2)], backend="vmap"),
        "ExpertBank: `experts` must be modules with parameters of one build for backend 'vmap', "
        "got ['Linear', 'Bilinear']. Use 'loop'.",
    ),
    "expert shapes": (
        lambda: ExpertBank([LAYER, wide()[0]])(X),
        "ExpertBank: the outputs of all experts must have one shape, got [4, 8] of expert 0, "
        "[4, 9] of expert 1.",
    ),
}

TYPE_ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "encoder": (
        lambda: HPS(3, HEADS),  # type: ignore[arg-type]
        "HPS: `encoder` must be a module, a list of stages, or a function without arguments that "
        "makes one, got 3.",
    ),
    "no stages": (
        lambda: LearningToBranch([], HEADS),
        "LearningToBranch: `stages` must be a module, a list of stages, or a function without "
        "arguments that makes one, got [].",
    ),
    "one expert": (
        lambda: mmoe.func(LAYER, HEADS, num_experts=2),
        "ExpertBank: `experts` must be a factory or a list of modules, got Linear. Pass a function "
        "that makes a new expert at each call, because copies of one module never grow apart.",
    ),
    "bank for all": (
        lambda: CGC(ExpertBank(KIT.stage, 2), HEADS, num_shared=2, num_specific=2),  # type: ignore[arg-type]
        "CGC: experts must come from a factory, which makes those of each task anew, got "
        "ExpertBank.",
    ),
    "list for all": (
        lambda: PLE([[LAYER]], HEADS, num_shared=1, num_specific=1),
        "PLE: experts must come from a factory, which makes those of each task anew, got list.",
    ),
    "gate module": (
        lambda: Gate(LAYER),
        "Gate: `input` must be a name or a function without parameters, got Linear. "
        "Put a module into `stem`.",
    ),
    "numbered tokens": (
        lambda: MMoE(lambda: nn.Embedding(9, 8), HEADS, num_experts=2)(torch.ones(2, 5).long()),
        "Gate: `input` must give floating point, got torch.int64. "
        "Embed the input in a `stem`, or read something else.",
    ),
}


@pytest.mark.parametrize(("call", "sentence"), VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_bad_values(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call()


@pytest.mark.parametrize(("call", "sentence"), TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_bad_types(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        call()
