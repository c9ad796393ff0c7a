"""Fixtures: Horovod workers shared by all tests."""

from collections.abc import Iterator

import pytest
from pool import Pool, PoolOf


@pytest.fixture(scope="session")
def workers() -> Iterator[PoolOf]:
    """workers(n): n Horovod workers, started at first use. At most one set of them is up, for the memory's sake."""
    pools: dict[int, Pool] = {}

    def of(size: int) -> Pool:
        for other, pool in pools.items():
            if other != size:
                pool.close()
        return pools.setdefault(size, Pool(size))

    yield of
    for pool in pools.values():
        pool.close()
