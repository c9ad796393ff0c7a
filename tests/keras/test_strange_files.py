"""Altered variables and configs of .keras files, and altered checkpoints: refused by a documented error, or taken."""

import warnings
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.tf import SlowMo, SlowMoConfig
from support.faulty_files import altered, deepened, forged, is_raised_by_us

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SEED = 11
CONFIGS = [SlowMoConfig(tau=3), SlowMoConfig(tau=2, alpha=0.5, nonfinite="exclude")]
INNERS = [lambda: keras.optimizers.SGD(0.1, momentum=0.5), lambda: keras.optimizers.RMSprop(0.1)]


def made(kind, steps):
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    optimizer = SlowMo(INNERS[kind](), CONFIGS[kind])
    optimizer.build(model.trainable_variables)
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    for step in range(steps):
        gradients = [tf.fill(v.shape, 0.1 * (step + 1)) for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)


def values(model, optimizer):
    return [v.numpy() for v in (*model.variables, *optimizer.variables)]


class Sources:
    """Optimizers that load, and whole sources, by kind."""

    def __init__(self, folder):
        self.folder = folder
        self.pairs, self.stores, self.configs, self.before = [], [], [], []
        for kind in range(len(INNERS)):
            model, optimizer = made(kind, 4)
            store = {}
            optimizer.save_own_variables(store)
            optimizer.save(folder / f"whole{kind}", model)
            self.stores.append(store)
            self.configs.append(optimizer.get_config())
            self.pairs.append(made(kind, 2))
            self.before.append(values(*self.pairs[kind]))

    def variables(self, kind, rng):
        store, fault = altered_store(self.stores[kind], rng)
        return fault, lambda model, optimizer: optimizer.load_own_variables(store)

    def config(self, kind, rng):
        config, fault = altered(self.configs[kind], rng)
        config = deepened(config)
        return fault, lambda model, optimizer: SlowMo.from_config(config)

    def checkpoint(self, kind, rng):
        data, fault = forged(self.folder / f"whole{kind}", rng)
        (self.folder / "altered").write_bytes(data)
        return fault, lambda model, optimizer: optimizer.load(self.folder / "altered", model)

    def run(self, area, number):
        rng = np.random.default_rng([SEED, number])
        kind = number % len(INNERS)
        fault, load = getattr(self, area)(kind, rng)
        model, optimizer = self.pairs[kind]
        try:
            load(model, optimizer)
        except CheckpointError as error:
            check_is_ours(error, fault)
            now = values(model, optimizer)
            assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(now, self.before[kind], strict=True)), fault
            return "refused"
        if area != "config":
            try:
                train(model, optimizer, 4)
            except ValueError as error:  # values that are not finite
                check_is_ours(error, fault)
            self.restart(kind)
        return "accepted"

    def restart(self, kind):
        model, optimizer = self.pairs[kind]
        for v, value in zip((*model.variables, *optimizer.variables), self.before[kind], strict=True):
            v.assign(value)


def check_is_ours(error, fault):
    assert is_raised_by_us(error), f"{fault}: {error!r}"


def altered_store(store, rng):
    store = {name: value.copy() for name, value in store.items()}
    names = list(store)
    name = names[rng.integers(len(names))]
    value = store[name]
    kind = ("missing", "renamed", "shape", "type", "odd", "odd", "odd", "swapped")[rng.integers(8)]
    if kind == "missing":
        del store[name]
    elif kind == "renamed":
        store[f"{name}x"] = store.pop(name)
    elif kind == "shape":
        store[name] = value[..., None]
    elif kind == "type":
        store[name] = value.astype("int32" if value.dtype.kind == "f" else "float64")
    elif kind == "odd":
        store[name] = np.full_like(value, (-1, 0, 2**40 if value.dtype.kind == "i" else np.nan)[rng.integers(3)])
    else:
        other = names[rng.integers(len(names))]
        store[name], store[other] = store[other], store[name]
    return store, f"{kind} of {name}"


@pytest.mark.slow
@pytest.mark.parametrize("total", [40, pytest.param(1500, marks=pytest.mark.thorough)])
def test_altered_files_are_refused_by_a_documented_error_or_work(total, tmp_path):
    sources, faults = Sources(tmp_path), []
    outcomes = {area: Counter() for area in ("variables", "config", "checkpoint")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # settings without effect
        for number in range(total):
            area = list(outcomes)[number % 3]
            try:
                outcomes[area][sources.run(area, number)] += 1
            except Exception as error:
                outcomes[area]["fault"] += 1
                faults.append(f"{area} {number}: {type(error).__name__}: {str(error)[:300]}")
    assert not faults, "\n".join(faults[:40])
    assert sum(outcome.total() for outcome in outcomes.values()) == total
    assert all(outcome["refused"] > 0.3 * outcome.total() for outcome in outcomes.values()), outcomes
    assert all(outcome["accepted"] for outcome in outcomes.values()), "some faults are harmless"
