import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    """Keep what was imported out of `gc.collect`, which measurements call often."""
    gc.freeze()
    yield
    gc.unfreeze()
