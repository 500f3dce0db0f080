"""Metrics in TensorBoard, and in the form that MLflow and Weights & Biases take."""

import re
from pathlib import Path

import pytest
from models import Toy, wrapped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from gradbal import MTLOptimizer

STEPS = 3


def trained() -> tuple[MTLOptimizer, list[dict[str, float]]]:
    model = Toy()
    optimizer, history = wrapped(model, "upgrad"), list[dict[str, float]]()
    for batch in range(STEPS):
        optimizer.step(model.named(batch))
        history.append({name: float(value) for name, value in optimizer.metrics().items()})
    return optimizer, history


def test_scalars_come_back_from_the_event_file(tmp_path: Path) -> None:
    model = Toy()
    optimizer, (_, history) = wrapped(model, "upgrad"), trained()
    with SummaryWriter(str(tmp_path)) as writer:
        for batch in range(STEPS):
            optimizer.step(model.named(batch))
            for name, value in optimizer.metrics().items():
                writer.add_scalar(name, value, batch)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(history[0])
    for name in history[0]:
        found = [event.value for event in events.Scalars(name)]
        assert found == pytest.approx([step[name] for step in history], rel=1e-6, abs=1e-6)


def test_names_and_values_are_what_mlflow_and_wandb_take() -> None:
    """MLflow refuses other characters; both take a flat dict of Python numbers."""
    _, history = trained()
    for name, value in history[-1].items():
        assert re.fullmatch(r"[A-Za-z0-9_/. -]+", name)
        assert type(value) is float
