"""What the page on the Trainer of transformers shows, in several processes."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from integrations.halves import whole
from test_transformers import SIZE, STEPS, parts, sentences, trainer
from torch import Tensor, nn


def train(rule: str, folder: str) -> list[Tensor]:
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())  # Lightning deletes it when it ends
    model, optimizer, schedule = parts(rule)
    trainer(model, (optimizer, schedule), Path(folder)).train()
    return whole(model.parameters())


def by_hand(rule: str, n_processes: int) -> list[Tensor]:
    """Train in one process on batches of so many processes, and return the parameters."""
    model, optimizer, schedule = parts(rule)
    data, size = sentences(), n_processes * SIZE
    for step in range(STEPS):
        rows = data[step * size : (step + 1) * size]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        optimizer.backward(model(**batch))
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return whole(model.parameters())
