"""TorchJD as the benchmarks call it."""

import pytest
import torch

from benchmarks.contestants import PEERS, check, contestants
from benchmarks.models import MODELS, Size, make_model

SMALL = {
    "mlp": Size(batch=8, width=16, depth=2, length=5),
    "cnn": Size(batch=4, width=4, depth=3, length=8),
    "transformer": Size(batch=4, width=8, depth=1, length=3),
    "recommender": Size(batch=8, width=4, depth=1, length=20),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch, of attention in vmap
@pytest.mark.parametrize("name", MODELS)
def test_both_modes_step_with_our_gradients(name: str) -> None:
    model = make_model(name, 3, SMALL[name], torch.device("cpu"), torch.float32)
    differences, complaints = check(contestants(["sequential"]), model, 1e-3)
    assert not complaints
    assert {*PEERS} <= differences.keys()
