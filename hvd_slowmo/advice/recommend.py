"""The settings to take: those with the smallest tau whose overhead is below a share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from hvd_slowmo.advice.cost import Cost, Job, cost
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.settings import Bits

MOST_TAU = 10_000
"""Greatest tau that is recommended."""


class Form(NamedTuple):
    """A method as the table lists it.

    Attributes:
        name: of the method.
        code: of its settings, with "{tau}" for tau.
        make: makes the settings of tau, which methods without blocks ignore.
    """

    name: str
    code: str
    make: Callable[[int], SlowMoConfig]


_BITS: tuple[tuple[Bits, str], ...] = ((32, ", bits=32"), (8, ""), (4, ", bits=4"))
"""Precisions of the streamed form, and their code."""


def _streaming(tau: int, bits: Bits) -> SlowMoConfig:
    return SlowMoConfig.streaming(tau, bits=bits)


AR_SGD = Form("AR-SGD", "SlowMoConfig.ar_sgd()", lambda _: SlowMoConfig.ar_sgd())
GOSSIP = (
    Form("SGP", "SlowMoConfig.sgp()", lambda _: SlowMoConfig.sgp()),
    Form("OSGP", "SlowMoConfig.osgp()", lambda _: SlowMoConfig.osgp()),
    Form("D-PSGD", "SlowMoConfig.dpsgd()", lambda _: SlowMoConfig.dpsgd()),
)

OUTER = (
    Form("SlowMo", "SlowMoConfig(tau={tau})", lambda tau: SlowMoConfig(tau=tau)),
    *(
        Form("SlowMo, streamed", f"SlowMoConfig.streaming(tau={{tau}}{code})", partial(_streaming, bits=bits))
        for bits, code in _BITS
    ),
)
"""Methods of which one is recommended: one outer step, from the form that waits for it to the one that sends least."""

BLOCKS = (
    Form("Local SGD", "SlowMoConfig.local_sgd(tau={tau})", lambda tau: SlowMoConfig.local_sgd(tau)),
    Form("SlowMo over SGP", "SlowMoConfig.sgp(tau={tau}, beta=0.5)", lambda tau: SlowMoConfig.sgp(tau=tau, beta=0.5)),
    Form(
        "SlowMo over OSGP", "SlowMoConfig.osgp(tau={tau}, beta=0.5)", lambda tau: SlowMoConfig.osgp(tau=tau, beta=0.5)
    ),
    Form(
        "SlowMo over D-PSGD",
        "SlowMoConfig.dpsgd(tau={tau}, beta=0.5)",
        lambda tau: SlowMoConfig.dpsgd(tau=tau, beta=0.5),
    ),
    *OUTER,
)
"""Methods with blocks of tau steps."""


class Row(NamedTuple):
    """A row of the table."""

    form: Form
    config: SlowMoConfig
    cost: Cost


class Choice(NamedTuple):
    """The smallest tau of a form with which the overhead is below the share."""

    form: Form
    tau: int
    cost: Cost

    @property
    def code(self) -> str:
        """The settings as Python code."""
        return self.form.code.format(tau=self.tau)


class Advice(NamedTuple):
    """A recommendation.

    Attributes:
        plain: cost of plain data-parallel training, AR-SGD.
        plain_suffices: its overhead is below the share.
        choices: of each form with which any tau suffices, the smallest tau; the recommended one first.
    """

    plain: Cost
    plain_suffices: bool
    choices: tuple[Choice, ...]


def rows_of(job: Job, taus: Sequence[int]) -> list[Row]:
    """Return the table of all methods, for each tau.

    Example:
        >>> from hvd_slowmo.advice.link import link_of
        >>> from hvd_slowmo.advice.training import training_of
        >>> job = Job(training_of(parameters=25_000_000, seconds=0.2), link_of(125e6, 0.001, workers=2))
        >>> [row.form.name for row in rows_of(job, [12])][:6]
        ['AR-SGD', 'SGP', 'OSGP', 'D-PSGD', 'Local SGD', 'SlowMo over SGP']
    """
    forms = [*((form, 1) for form in (AR_SGD, *GOSSIP)), *((form, tau) for tau in taus for form in BLOCKS)]
    configs = [(form, form.make(tau)) for form, tau in forms]
    return [Row(form, config, cost(config, job)) for form, config in configs]


def advise(job: Job, share: float) -> Advice:
    """Return the settings whose overhead is below a share.

    A smaller tau keeps the workers closer together; of two forms with one tau the simpler comes first.

    Example:
        >>> from hvd_slowmo.advice.link import link_of
        >>> from hvd_slowmo.advice.training import training_of
        >>> job = Job(training_of(parameters=25_000_000, seconds=0.2), link_of(125e6, 0.001, workers=2))
        >>> advise(job, share=0.05).choices[0].code
        'SlowMoConfig.streaming(tau=2)'
    """
    plain = cost(SlowMoConfig.ar_sgd(), job)
    found = [(form, smallest_tau(form, job, share)) for form in OUTER]
    choices = [Choice(form, tau, cost(form.make(tau), job)) for form, tau in found if tau is not None]
    return Advice(plain, plain.overhead <= share, tuple(sorted(choices, key=lambda choice: choice.tau)))


def smallest_tau(form: Form, job: Job, share: float) -> int | None:
    """Return the smallest tau >= 2 whose overhead is at most the share; None if that of none up to `MOST_TAU` is.

    Example:
        >>> from hvd_slowmo.advice.link import link_of
        >>> from hvd_slowmo.advice.training import training_of
        >>> job = Job(training_of(parameters=25_000_000, seconds=0.2), link_of(125e6, 0.0, workers=2))
        >>> smallest_tau(OUTER[0], job, share=0.06)  # 0.8 s for an outer step, and 0.012 s are allowed per step
        67
    """

    def suffices(tau: int) -> bool:
        return cost(form.make(tau), job).overhead <= share

    low, high = 1, 2
    while not suffices(high):
        if high == MOST_TAU:
            return None
        low, high = high, min(2 * high, MOST_TAU)
    while high - low > 1:  # the overhead falls with tau
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high
