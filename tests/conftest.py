"""Fixtures: Horovod workers shared by all tests."""

from collections.abc import Callable, Iterator

import pytest

from support.pool import Pool, PoolOf


def _pools(horovod: str) -> Iterator[PoolOf]:
    pools: dict[int, Pool] = {}

    def of(size: int) -> Pool:
        for other, pool in pools.items():
            if other != size:
                pool.close()
        return pools.setdefault(size, Pool(size, horovod))

    yield of
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def workers() -> Iterator[PoolOf]:
    """workers(n): n Horovod workers, started at first use. At most one set of them is up, for the memory's sake."""
    yield from _pools("horovod.torch")


@pytest.fixture(scope="module")
def keras_workers() -> Iterator[PoolOf]:
    """The same on TensorFlow's Horovod; they end with the module, since TensorFlow takes much memory."""
    yield from _pools("horovod.tensorflow")


@pytest.fixture(scope="module")
def mixed_workers() -> Iterator[Callable[[str], Pool]]:
    """mixed_workers("tk"): workers by rank, t on PyTorch's Horovod and k on TensorFlow's. One set of them is up."""
    pools: dict[str, Pool] = {}

    def of(kinds: str) -> Pool:
        for other, pool in pools.items():
            if other != kinds:
                pool.close()
        horovod = {"t": "horovod.torch", "k": "horovod.tensorflow"}
        return pools.setdefault(kinds, Pool(len(kinds), [horovod[kind] for kind in kinds]))

    yield of
    for pool in pools.values():
        pool.close()
