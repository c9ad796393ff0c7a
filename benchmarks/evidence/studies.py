"""The studies: the cells of each table, and the runs that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from evidence.images import Shards
from hvd_slowmo import DPSGD, SGP, SlowMoConfig

TAU = 12
TUNED_BETA = 0.5  # of all tables but the one over beta

# The methods, each alone and with SlowMo.
METHODS: dict[str, tuple[SlowMoConfig, SlowMoConfig]] = {
    "AR-SGD": (SlowMoConfig.ar_sgd(), SlowMoConfig(tau=TAU, beta=TUNED_BETA, gradients="all")),
    "Local SGD": (SlowMoConfig.local_sgd(TAU), SlowMoConfig(tau=TAU, beta=TUNED_BETA)),
    "SGP": (SlowMoConfig.sgp(), SlowMoConfig(tau=TAU, beta=TUNED_BETA, gossip=SGP())),
    "OSGP": (SlowMoConfig.osgp(), SlowMoConfig(tau=TAU, beta=TUNED_BETA, gossip=SGP(overlap=True))),
    "D-PSGD": (SlowMoConfig.dpsgd(), SlowMoConfig(tau=TAU, beta=TUNED_BETA, gossip=DPSGD())),
}

TRANSLATION_METHODS = {"Local Adam": "Local SGD", "SGP with Adam": "SGP", "AR-Adam": "AR-SGD"}
"""Methods of the translation, and those of `METHODS` with the same settings."""


class Cell(NamedTuple):
    """A cell of a table: settings on so many workers.

    Attributes:
        tuned_as: cell of the tuning whose learning rate it takes.
    """

    name: str
    config: SlowMoConfig
    workers: int
    tuned_as: str
    shards: Shards = "alike"


class Translation(NamedTuple):
    """The size of the translation study; see `Plan`."""

    seeds: int
    tuning_seeds: tuple[int, ...]
    rates: tuple[float, ...]
    workers: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """The size of the evidence.

    Attributes:
        seeds: of each cell; tuning has seeds of its own.
        rates: learning rates of the tuning.
        workers: of the table of methods; the first one in the other tables.
        translation: None to leave it out.
    """

    seeds: int
    tuning_seeds: tuple[int, ...]
    rates: tuple[float, ...]
    workers: tuple[int, ...]
    taus: tuple[int, ...]
    betas: tuple[float, ...]
    beta_workers: tuple[int, ...]
    steps: int
    translation: Translation | None


FULL = Plan(
    seeds=5,
    tuning_seeds=(1000, 1001),
    rates=(0.005, 0.01, 0.02, 0.05, 0.1),
    workers=(8, 32),
    taus=(1, 2, 4, 8, 12, 24, 48, 96),
    betas=(0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8),
    beta_workers=(4, 8, 16, 32),
    steps=480,
    translation=Translation(seeds=3, tuning_seeds=(1000,), rates=(0.002, 0.004, 0.008, 0.016), workers=8, steps=800),
)
EIGHT = replace(FULL, workers=(8,), beta_workers=(4, 8))
"""The part of the full size that eight workers at most and no translation make up: half an hour instead of two."""

QUICK = Plan(
    seeds=4,
    tuning_seeds=(1000,),
    rates=(0.05, 0.1, 0.2),
    workers=(8,),
    taus=(1, 4, 12, 48),
    betas=(0.0, 0.5),
    beta_workers=(4, 8),
    steps=192,
    translation=None,
)
SMOKE = Plan(
    seeds=1,
    tuning_seeds=(1000,),
    rates=(0.1,),
    workers=(2,),
    taus=(12,),
    betas=(0.5,),
    beta_workers=(2,),
    steps=24,
    translation=Translation(seeds=1, tuning_seeds=(1000,), rates=(0.003,), workers=2, steps=12),
)


def with_slowmo(method: str) -> str:
    """Return the name of a method's cell with SlowMo."""
    return f"{method} + SlowMo"


def methods(plan: Plan) -> Iterator[Cell]:
    """Yield the cells of the paper's Table 1."""
    for workers in plan.workers:
        for method, (alone, slow) in METHODS.items():
            yield Cell(method, alone, workers, method)
            yield Cell(with_slowmo(method), slow, workers, with_slowmo(method))


def translators(plan: Translation) -> Iterator[Cell]:
    """Yield the cells of translation, whose inner optimizer is Adam with its state maintained."""
    for name, method in TRANSLATION_METHODS.items():
        alone, slow = METHODS[method]
        yield Cell(name, alone, plan.workers, name)
        yield Cell(with_slowmo(name), slow, plan.workers, with_slowmo(name))


def over_tau(plan: Plan) -> Iterator[Cell]:
    """Yield the cells over tau."""
    for tau in plan.taus:
        yield Cell(f"Local SGD, τ = {tau}", SlowMoConfig.local_sgd(tau), plan.workers[0], "Local SGD")
        slow = SlowMoConfig(tau=tau, beta=TUNED_BETA)
        yield Cell(f"SlowMo, τ = {tau}", slow, plan.workers[0], with_slowmo("Local SGD"))


def over_beta(plan: Plan) -> Iterator[Cell]:
    """Yield the cells over beta and the number of workers."""
    for workers in plan.beta_workers:
        for beta in plan.betas:
            yield Cell(f"β = {beta:g}", SlowMoConfig(tau=TAU, beta=beta), workers, with_slowmo("Local SGD"))


def buffers(plan: Plan) -> Iterator[Cell]:
    """Yield the cells over the inner state, and those of noaverage."""
    slow, over_sgp = with_slowmo("Local SGD"), with_slowmo("SGP")
    for state in ("maintain", "reset", "average"):
        yield Cell(
            f"inner state: {state}", SlowMoConfig(tau=TAU, beta=TUNED_BETA, inner_state=state), plan.workers[0], slow
        )
    for average in (True, False):
        config = SlowMoConfig(tau=TAU, beta=TUNED_BETA, gossip=SGP(), average=average)
        yield Cell("SGP, average" if average else "SGP, noaverage", config, plan.workers[0], over_sgp)


def streaming(plan: Plan) -> Iterator[Cell]:
    """Yield the cells of late, streamed and few-bit exchanges, of workers alike and apart."""
    forms = {
        "blocking": {},
        "8 bits": {"bits": 8},
        "one step late": {"delay": 1},
        "four steps late": {"delay": 4},
        "12 fragments, one step late": {"fragments": 12, "delay": 1},
        "12 fragments, one step late, 8 bits": {"fragments": 12, "delay": 1, "bits": 8},
        "12 fragments, one step late, 4 bits": {"fragments": 12, "delay": 1, "bits": 4},
    }
    for shards in ("alike", "apart"):
        for name, settings in forms.items():
            config = SlowMoConfig(tau=TAU, beta=TUNED_BETA, **settings)
            yield Cell(f"{name}, {shards}", config, plan.workers[0], with_slowmo("Local SGD"), shards)


STUDIES: dict[str, Callable[[Plan], Iterator[Cell]]] = {
    "methods": methods,
    "tau": over_tau,
    "beta": over_beta,
    "buffers": buffers,
    "streaming": streaming,
}
