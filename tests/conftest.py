"""Fixtures: Horovod workers shared by all tests."""

import os
from collections.abc import Callable, Iterator

# Before PyTorch is imported: threads of several tests would wait for each other busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from support import sample
from support.pool import DISTRIBUTED, Pool, PoolOf

# Nothing here is timed: a busy machine takes its time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    sample.begin(config)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to `make test-all` tests on the second transport, unless they are marked, and variants beside a sample."""
    sample.leave_out(items)
    for item in items:
        transport = item.callspec.params.get("workers") if hasattr(item, "callspec") else None
        if transport == DISTRIBUTED and not item.get_closest_marker("both_transports"):
            item.add_marker(pytest.mark.thorough)


def _pools(transport: str, **variables: str) -> Iterator[PoolOf]:
    pools: dict[int, Pool] = {}

    def of(size: int) -> Pool:
        for other, pool in pools.items():
            if other != size:
                pool.close()
        return pools.setdefault(size, Pool(size, transport, **variables))

    yield of
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session", params=["horovod.torch", DISTRIBUTED])
def workers(request: pytest.FixtureRequest) -> Iterator[PoolOf]:
    """workers(n): n workers of each transport, started at first use. At most one set is alive, to save memory."""
    yield from _pools(request.param)


@pytest.fixture(scope="session")
def horovod_workers() -> Iterator[PoolOf]:
    """workers(n): n Horovod workers, for what only Horovod has."""
    yield from _pools("horovod.torch")


@pytest.fixture(scope="session")
def distributed_workers() -> Iterator[PoolOf]:
    """workers(n): n workers of torch.distributed, for what only it has."""
    yield from _pools(DISTRIBUTED)


@pytest.fixture(scope="module")
def nccl_workers() -> Iterator[PoolOf]:
    """workers(n): n workers of torch.distributed with NCCL."""
    yield from _pools(DISTRIBUTED, POOL_NCCL="1")


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
