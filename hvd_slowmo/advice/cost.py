"""The cost model: time, traffic and memory of a step with given settings. docs/advice.md has the formulas.

Lengths are in bytes and times in seconds. A period is a block of tau steps, or one step where there are no blocks.
"""

from __future__ import annotations

from typing import NamedTuple

from hvd_slowmo.advice.host import Host, Work
from hvd_slowmo.advice.link import Line, Link
from hvd_slowmo.advice.training import Training
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.codec import payload_bytes
from hvd_slowmo.core.parts.layout import BLOCK, CHUNK_BYTES
from hvd_slowmo.core.start.memory import bytes_beside_model
from hvd_slowmo.gossip import DPSGD, SGP

_SGP, _OSGP, _DPSGD = SGP(), SGP(overlap=True), DPSGD()


class Job(NamedTuple):
    """A training run on the machines and the network of its workers."""

    training: Training
    link: Link
    host: Host = Host()


class Cost(NamedTuple):
    """The cost of a step, on average over a block.

    Attributes:
        seconds: of a step.
        overhead: by which share of a step without exchanges it is longer.
        sent: bytes that a worker sends per step.
        memory: bytes of vectors beside the model.
        hidden: share of the exchanges' time by which the steps are not longer.
    """

    seconds: float
    overhead: float
    sent: float
    memory: int
    hidden: float


class _Period(NamedTuple):
    """A period: its time, that of its exchanges if nothing hid them, and the bytes that a worker sends."""

    seconds: float
    exchanging: float
    sent: float


def cost(config: SlowMoConfig, job: Job) -> Cost:
    """Return the predicted cost of a step.

    The warm-up is not considered. Parameters count as matrices in one parameter group; statistics are left out.

    Args:
        config: averages gradients over all workers (AR-SGD), or mixes by SGP, OSGP or D-PSGD on their default topology,
            or neither, with any tau, fragments, delay and bits.

    Raises:
        ValueError: other settings, of which the model knows nothing.

    Example:
        >>> from hvd_slowmo.advice.link import link_of
        >>> from hvd_slowmo.advice.training import training_of
        >>> job = Job(training_of(parameters=25_000_000, seconds=0.2), link_of(125e6, 0.001, workers=2))
        >>> round(cost(SlowMoConfig(tau=10), job).seconds, 4)  # 0.2 + (6 * 2 * 0.001 + 0.8) / 10
        0.2812
    """
    _refuse_unknown(config)
    gossip_vectors = 0
    if config.gradients == "all":
        period = _averaged_gradients(job)
    elif config.gossip == _OSGP:
        period, gossip_vectors = _late_gossip(config, job), 2  # the numerators, and the messages that are under way
    elif config.gossip is not None:
        period = _gossip(config, job)
    elif config.delay:
        period = _late(config, job)
    else:
        period = _blocking(config, job)
    steps, training = config.tau or 1, job.training
    added = max(0.0, period.seconds - steps * training.seconds)
    sliced = training.length if config.bits < 32 else 0
    return Cost(
        seconds=period.seconds / steps,
        overhead=period.seconds / (steps * training.seconds) - 1,
        sent=period.sent / steps,
        memory=bytes_beside_model(config, training.length, sliced, job.link.workers, gossip_vectors),
        hidden=max(0.0, 1 - added / period.exchanging) if period.exchanging else 0.0,
    )


def messages(length: int, fragments: int = 1) -> int:
    """Return the number of messages of a fragment, as `hvd_slowmo.core.parts.layout` cuts it.

    Example:
        >>> messages(100_000_000), messages(100_000_000, fragments=12)
        (6, 1)
    """
    return -(-length // (CHUNK_BYTES * fragments))


def ring_bytes(length: float, workers: int) -> float:
    """Return the bytes that a worker sends for the sum of a vector, in a ring: 2 (m - 1) / m vectors.

    Example:
        >>> ring_bytes(1000, workers=4)
        1500.0
    """
    return 2 * (workers - 1) / workers * length


def _refuse_unknown(config: SlowMoConfig) -> None:
    nothing = config.tau is None and config.gossip is None and config.gradients != "all"
    other = config.gossip not in (None, _SGP, _OSGP, _DPSGD)
    both = config.gradients == "all" and config.tau is not None
    if nothing or other or both or config.shard or config.gradients == "node" or not config.average:
        raise ValueError(f"the cost model knows nothing of these settings. Received: {config}")


def _averaged_gradients(job: Job) -> _Period:
    """Return a step of AR-SGD: all messages leave while backward makes the last ones.

    What two threads do at once takes no longer than one thing after the other, in spite of the processor time that was
    measured: where workers share few cores, threads that wait for each other use some of it.
    """
    training, link, host = job.training, job.link, job.host
    length, number = training.length, messages(training.length)
    work = host.average.own.seconds(length)
    exchanging = link.sums.seconds(length, number) + work
    hidden = (1 - 1 / number) * min(training.backward, exchanging)
    busy = training.work + host.processor(work) + link.sums.work * length
    one_by_one = training.seconds + exchanging
    seconds = min(one_by_one, max(one_by_one - hidden, busy / host.cores))
    return _Period(seconds, exchanging, ring_bytes(length, link.workers))


def _gossip(config: SlowMoConfig, job: Job) -> _Period:
    """Return a block of SGP or D-PSGD: the messages of each step, and the outer step in the place of the last ones."""
    training, steps = job.training, config.tau or 1
    receivers = _receivers(config, job.link.workers)
    mixing = _in_messages(job, receivers * [job.link.pushes], job.host.average)
    mixes = steps if config.tau is None else steps - 1
    exchanging, sent = mixes * mixing, float(mixes * receivers * training.length)
    if config.tau is not None:
        outer = _blocking(config, job)
        exchanging, sent = exchanging + outer.exchanging, sent + outer.sent
    return _Period(steps * training.seconds + exchanging, exchanging, sent)


def _receivers(config: SlowMoConfig, workers: int) -> int:
    """Return the number of workers to which each one sends at a step: D-PSGD has both neighbours where m is odd."""
    return 2 if config.gossip == _DPSGD and workers % 2 else 1


def _late_gossip(config: SlowMoConfig, job: Job) -> _Period:
    """Return a block of OSGP: each message travels beside the next step.

    A block's last step mixes nothing, and the average counts the messages of the step before where they are.
    """
    training, length = job.training, job.training.length
    steps, mixing = config.tau or 1, job.host.average.own.seconds(length)
    mixes = steps if config.tau is None else steps - 1
    beside = mixes if config.tau is None else max(0, mixes - 1)
    exchange = _Exchange(job.link.pushes.seconds(length, messages(length)), mixing, 0.0, job.link.pushes.work * length)
    seconds = beside * exchange.window(1, job) + (steps - beside) * training.seconds + (mixes - beside) * mixing
    exchanging, sent = beside * exchange.links + mixes * mixing, float(beside * length)
    if config.tau is not None:
        outer = _blocking(config, job)
        seconds, exchanging, sent = seconds + outer.exchanging, exchanging + outer.exchanging, sent + outer.sent
    return _Period(seconds, exchanging, sent)


def _blocking(config: SlowMoConfig, job: Job) -> _Period:
    """Return a block whose exchanges nothing hides."""
    exchanging = config.fragments * _in_messages(job, _lines(config, job), _work(config, job), config)
    steps = config.tau or 1
    return _Period(steps * job.training.seconds + exchanging, exchanging, _sent(config, job))


class _Exchange(NamedTuple):
    """An exchange beside steps: seconds of the links and of the work in both threads, and the transport's processor."""

    links: float
    own: float
    beside: float
    transport: float

    @property
    def lasting(self) -> float:
        """Seconds from its start until its result can be applied."""
        return self.links + self.beside

    @property
    def whole(self) -> float:
        """Seconds of the exchange with nothing beside it."""
        return self.lasting + self.own

    def busy(self, job: Job) -> float:
        """Return its processor seconds."""
        return job.host.processor(self.own + self.beside) + self.transport

    def window(self, steps: int, job: Job) -> float:
        """Return the time of so many steps and the exchange beside them, for which the training waits then."""
        training = job.training
        elapsed = max(steps * training.seconds, self.lasting) + self.own
        busy = (steps * training.work + self.busy(job)) / job.host.cores
        return min(steps * training.seconds + self.whole, max(elapsed, busy))


def _late(config: SlowMoConfig, job: Job) -> _Period:
    """Return a block with exchanges beside its steps: the bound that is reached last counts.

    An exchange occupies the links, the processors, and for `delay` steps the training, which waits for it then.
    """
    training, host, delay = job.training, job.host, config.delay
    steps, fragments = config.tau or 1, config.fragments
    length = training.length / fragments
    work, lines = _work(config, job), _lines(config, job)
    number = messages(training.length, fragments)
    exchange = _Exchange(
        links=sum(line.seconds(length * config.bits / 32, number) for line in lines),
        own=work.own.seconds(length),
        beside=work.beside.seconds(length),
        transport=sum(line.work * length * config.bits / 32 for line in lines),
    )
    if fragments * delay <= steps:  # one exchange at a time
        seconds = fragments * exchange.window(delay, job) + (steps - fragments * delay) * training.seconds
    else:
        waiting = max(steps * training.seconds, fragments * exchange.links, steps * exchange.lasting / delay)
        busy = steps * training.work + fragments * exchange.busy(job)
        one_by_one = steps * training.seconds + fragments * exchange.whole
        seconds = min(one_by_one, max(waiting + fragments * exchange.own, busy / host.cores))
    return _Period(seconds, fragments * exchange.whole, _sent(config, job))


def _in_messages(job: Job, lines: list[Line], work: Work, config: SlowMoConfig | None = None) -> float:
    """Return the time of a vector, or a fragment, in messages: one is worked on while the next one travels.

    Args:
        lines: the collectives of a message.
        config: of an outer step; None: the whole vector in 32 bits.
    """
    fragments, bits = (1, 32) if config is None else (config.fragments, config.bits)
    number = messages(job.training.length, fragments)
    length = job.training.length / fragments / number
    travelling = sum(line.seconds(length * bits / 32) for line in lines)
    working = work.both.per_byte * length
    transport = sum(line.work * length * bits / 32 for line in lines)
    both = max(travelling, job.host.together(working, transport))
    return travelling + (number - 1) * both + working + work.both.latency


def _lines(config: SlowMoConfig, job: Job) -> list[Line]:
    """Return the collectives of a message of an outer step."""
    return [job.link.alltoalls, job.link.allgathers] if config.bits < 32 else [job.link.sums]


def _work(config: SlowMoConfig, job: Job) -> Work:
    """Return the processors' part in an outer step."""
    if config.delay or config.bits < 32:
        return job.host.late_work(config.bits)
    return job.host.slowmo if config.vectors else job.host.average


def _sent(config: SlowMoConfig, job: Job) -> float:
    """Return the bytes that a worker sends for the outer steps of a block."""
    length, workers = job.training.length, job.link.workers
    if config.bits == 32:
        return ring_bytes(length, workers)
    return ring_bytes(payload_bytes(-(-length // 4 // BLOCK) * BLOCK, config.bits), workers)
