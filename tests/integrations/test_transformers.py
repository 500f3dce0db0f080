"""The Trainer of transformers with a tiny BERT made from a config, against a loop by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same, frozen_copy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import SequentialSampler
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from gradbal import MTLOptimizer

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors
SIZE, STEPS = 4, 6


class Tagger(nn.Module):
    """An encoder with a head for the whole sentence and one for every word."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({"topic": nn.Linear(16, 3), "tags": nn.Linear(16, 5)})

    def forward(self, input_ids: Tensor, topic: Tensor, tags: Tensor) -> dict[str, Tensor]:
        words = self.encoder(input_ids).last_hidden_state
        first = nn.functional.cross_entropy(self.heads["topic"](words[:, 0]), topic)
        second = nn.functional.cross_entropy(
            self.heads["tags"](words).flatten(0, 1), tags.flatten()
        )
        return {"topic": first, "tags": second}


class MTLTrainer(Trainer):
    """The recipe of the page on the Trainer."""

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        model.train()
        with self.compute_loss_context_manager():
            losses = model(**self._prepare_inputs(inputs))
        pieces = self.current_gradient_accumulation_steps
        losses = {task: loss / pieces for task, loss in losses.items()}
        self.optimizer.optimizer.backward(losses, scaler=self.accelerator.scaler)
        return torch.stack(list(losses.values())).sum().detach()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def sentences() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(20, (6,), generator=draw),
            "topic": torch.randint(3, (), generator=draw),
            "tags": torch.randint(5, (6,), generator=draw),
        }
        for _ in range(SIZE * STEPS * 2)
    ]


def parts(rule: str) -> tuple[Tagger, MTLOptimizer, LinearLR]:
    model = Tagger()
    optimizer = MTLOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), rule)
    return model, optimizer, LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)


def by_hand(rule: str, *, pieces: int, bf16: bool = False) -> tuple[Tagger, MTLOptimizer]:
    model, optimizer, schedule = parts(rule)
    data = sentences()
    for step in range(STEPS):
        for piece in range(pieces):
            first = (step * pieces + piece) * SIZE
            rows = data[first : first + SIZE]
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                losses = model(**batch)
            optimizer.backward({task: loss / pieces for task, loss in losses.items()})
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer


def trainer(model: nn.Module, optimizers: Any, folder: Path, **options: Any) -> MTLTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=SIZE,
        max_steps=STEPS,
        max_grad_norm=0.5,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **({"save_strategy": "no"} | options),
    )
    return MTLTrainer(model, arguments, train_dataset=sentences(), optimizers=optimizers)


@pytest.mark.parametrize("rule", ["ew", "upgrad", "uw", "gradvac"])
@pytest.mark.parametrize(
    ("pieces", "bf16"), [(1, False), (2, False), (2, True)], ids=["plain", "accumulate", "bf16"]
)
def test_the_recipe_trains_as_by_hand(rule: str, pieces: int, bf16: bool, tmp_path: Path) -> None:
    model, optimizer, schedule = parts(rule)
    run = trainer(
        model, (optimizer, schedule), tmp_path, gradient_accumulation_steps=pieces, bf16=bf16
    )
    run.train()
    plain, reference = by_hand(rule, pieces=pieces, bf16=bf16)
    assert_same(model.parameters(), plain.parameters(), 0)
    assert frozen_copy(optimizer.state_dict()) == frozen_copy(reference.state_dict())


@pytest.mark.parametrize("rule", ["upgrad", "uw", "gradvac", "rlw", "famo"])
def test_resume_from_a_checkpoint(rule: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2}
    saving = {**options, "save_strategy": "steps", "save_steps": 3}
    whole, optimizer, schedule = parts(rule)
    trainer(whole, (optimizer, schedule), tmp_path / "whole", **saving).train()
    rest, second, schedule = parts(rule)
    run = trainer(rest, (second, schedule), tmp_path / "rest", **options)
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(rest.parameters(), whole.parameters(), 0)
    assert frozen_copy(second.state_dict()) == frozen_copy(optimizer.state_dict())
