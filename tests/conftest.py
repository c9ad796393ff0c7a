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
    """workers(n): n Horovod workers, started at first use. At most one set is alive, to save memory."""
    yield from _pools("horovod.torch")


@pytest.fixture(scope="module")
def keras_workers() -> Iterator[PoolOf]:
    """workers(n) with TensorFlow's Horovod. They end with the module, since TensorFlow takes much memory."""
    yield from _pools("horovod.tensorflow")


@pytest.fixture(scope="module")
def mixed_workers() -> Iterator[Callable[[str], Pool]]:
    """mixed_workers("tk"): workers by rank, t with PyTorch's Horovod and k with TensorFlow's. One set is alive."""
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


@pytest.fixture
def float64() -> Iterator[None]:
    """Seed both frameworks, and set Keras to float64."""
    import torch  # first: in the other order its libraries may not load

    # isort: split
    import keras

    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(3)
    torch.manual_seed(3)
    yield
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(policy)
