import pytest
import torch


@pytest.fixture(autouse=True)
def _nothing_draws_from_the_global_generator() -> None:
    torch.manual_seed(0)
