"""LoRA adapters of peft on a tiny BERT: only they and the heads train."""

import copy
from typing import Any

import pytest
import torch
from models import assert_same, expected_grads, grads
from peft import LoraConfig, get_peft_model
from test_transformers import Tagger, sentences
from torch import Tensor, nn

from gradbal import MTLOptimizer

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors


def adapted() -> Tagger:
    model = Tagger()
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights="gaussian")
    model.encoder = get_peft_model(model.encoder, config)
    with torch.no_grad():  # the second factors are zero at first, so that the first get no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.ones_like(parameter) * 0.1)
    return model


def losses_of(model: Tagger, batch: int = 0) -> dict[str, Tensor]:
    rows = sentences()[4 * batch : 4 * batch + 4]
    found: dict[str, Tensor] = model(
        **{key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    )
    return found


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("rule", ["upgrad", "mgda", "pcgrad"])
@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_adapters_are_what_is_shared(rule: str, engine: str) -> None:
    model = adapted()
    optimizer = MTLOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), rule, engine=engine)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    wanted = expected_grads(list(losses_of(model).values()), list(model.parameters()), rule)
    optimizer.backward(losses_of(model))
    assert_same(grads(model), wanted, 1e-4)
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    assert f"2 tasks share {lora} parameters" in optimizer.explain(losses_of(model))
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None
            assert torch.equal(parameter, frozen[name])


def test_equal_weights_are_plain_training() -> None:
    ours, plain = adapted(), adapted()
    mtl = MTLOptimizer(torch.optim.AdamW(trainable(ours), lr=0.01), "ew")
    optimizer = torch.optim.AdamW(trainable(plain), lr=0.01)
    for batch in range(4):
        mtl.step(losses_of(ours, batch))
        optimizer.zero_grad()
        sum(losses_of(plain, batch).values()).backward()
        optimizer.step()
    assert_same(trainable(ours), trainable(plain), 1e-6)


def test_only_the_adapters_are_saved_and_loaded() -> None:
    def start() -> tuple[Tagger, MTLOptimizer]:
        model = adapted()
        return model, MTLOptimizer(torch.optim.AdamW(trainable(model), lr=0.01), "gradvac")

    def weights(model: Tagger) -> Any:
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        return {n: v for n, v in model.state_dict().items() if n in names}

    straight, optimizer = start()
    for batch in range(2):
        optimizer.step(losses_of(straight, batch))
    saved = copy.deepcopy([weights(straight), optimizer.state_dict()])
    other, second = start()
    other.load_state_dict(saved[0], strict=False)
    second.load_state_dict(saved[1])
    for batch in range(2, 4):
        optimizer.step(losses_of(straight, batch))
        second.step(losses_of(other, batch))
    assert_same(trainable(other), trainable(straight), 0)
