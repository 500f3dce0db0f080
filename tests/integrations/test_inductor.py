"""``torch.compile`` with its default backend, and the trap of buffers that are given away."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from models import assert_same, data, frozen_copy
from torch import Tensor, nn

from gradbal import MTLOptimizer, engines

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors


@pytest.fixture(autouse=True)
def _afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without compiled code: what was compiled for an ordinary pass is kept on disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(16, 2) for _ in range(3))

    def losses(self, batch: int = 0) -> list[Tensor]:
        z = self.trunk(data(8, 6, seed=batch, dtype=torch.float32))
        return [(head(z) - k).square().mean() for k, head in enumerate(self.heads)]


def compiled() -> Net:
    model = Net()
    model.trunk.forward = torch.compile(model.trunk.forward)  # type: ignore[method-assign]
    return model


def wrapped(model: Net, engine: engines.Engine | str = "sequential") -> MTLOptimizer:
    return MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), "upgrad", engine=engine)


def same_as_plain(model: Net, optimizer: MTLOptimizer) -> None:
    plain = Net()
    plain.load_state_dict(model.state_dict())
    reference = wrapped(plain, optimizer.engine)
    for batch in range(3):
        optimizer.step(model.losses(batch))
        reference.step(plain.losses(batch))
    assert_same(model.parameters(), plain.parameters(), 1e-5)


def test_compiled_after_a_first_step_of_ours() -> None:
    model = compiled()
    optimizer = wrapped(model)
    same_as_plain(model, optimizer)
    sum(model.losses()).backward()  # an ordinary pass may follow
    optimizer.zero_grad()
    same_as_plain(model, optimizer)
    assert max(optimizer.check(model.losses()).values()) < 1e-4


def test_compiled_in_an_ordinary_pass() -> None:
    """The error says what to do, the model is as it was, and what it says to do is right."""
    model = compiled()
    sum(model.losses()).backward()
    optimizer = wrapped(model)
    before = frozen_copy(dict(model.state_dict()))
    with pytest.raises(RuntimeError, match="use the engine Representation, or an empty compiler"):
        optimizer.step(model.losses())
    with pytest.raises(RuntimeError, match="use the engine Representation, or an empty compiler"):
        optimizer.check(model.losses())
    assert frozen_copy(dict(model.state_dict())) == before
    same_as_plain(model, wrapped(model, engines.Representation()))


def test_torchs_own_advice_gives_wrong_rows_and_check_finds_them() -> None:
    """With the switch turned off, code from the cache still writes into what it was given."""
    model = compiled()
    sum(model.losses()).backward()
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        again = compiled()
        with pytest.raises(RuntimeError, match=r"^check: the task gradients of '\w+' deviate by"):
            wrapped(again).check(again.losses())
