from collections.abc import Iterator

import pytest
from distributed.pool import Pool, Pools


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    found = Pools()
    yield found
    found.close()


@pytest.fixture
def two(pools: Pools) -> Pool:
    return pools[2]
