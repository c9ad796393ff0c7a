"""Elastic jobs over Horovod: workers are lost or added while the others train, and all come together again."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from hvd_slowmo.comm.launcher import elastic
from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.comm.time_limit import horovods_limit
from hvd_slowmo.comm.watchdog import Watchdog, others_wait

T = TypeVar("T")

logger = logging.getLogger("hvd_slowmo")


class Change(NamedTuple):
    """One time that the workers came together.

    Example:
        >>> Change(step=24, workers=2, newcomers=(), behind=(), seconds=0.5).workers
        2
    """

    step: int  # inner steps at which they go on
    workers: int
    newcomers: Sequence[int]  # ranks of those that had no state
    behind: Sequence[int]  # ranks of survivors that had to skip to the others' block: their steps in it are lost
    seconds: float  # from the moment when this worker noticed, or began, until it went on


class ElasticOptimizer(Protocol):
    """An adapter's optimizer as a `State` sees it."""

    def come_together(self) -> tuple[ScopedComm, Sequence[int], Sequence[int], Sequence[int]]:
        """Bring the present workers together. A collective.

        Returns:
            The workers; all ranks, first those whose state counts; the newcomers' ranks; those that were behind.
        """

    def leave(self) -> None:
        """Wait for what is in flight, failed or not: the workers are about to change."""

    def hear(self) -> None:
        """Tell the others at the next meeting that workers come or go; from any thread."""

    def agreed(self) -> bool:
        """Return whether a worker has told so at a meeting, which all know."""

    @property
    def steps(self) -> int:
        """Inner steps completed."""


class ElasticState:
    """The state of an elastic job, of any framework: optimizers, and values that are the same on all workers.

    Args:
        optimizers: one at least.
        values: become attributes. Objects with `state_dict` and `load_state_dict` (schedulers, samplers, scalers) keep
            their identity; all others are replaced, so they must be picklable. In a job of several frameworks those
            with a state, and those that the other framework's workers lack, are the framework's own.

    Attributes:
        framework: its name.
        changes: each time that the workers came together, the start included.
    """

    framework = ""

    def __init__(self, optimizers: Sequence[ElasticOptimizer], values: dict[str, Any]) -> None:
        self.changes: list[Change] = []
        self._optimizers = optimizers
        self._names = tuple(values)
        self._callbacks: list[Callable[[], None]] = []
        self._news = threading.Event()
        self._noticed: float | None = None
        for name, value in values.items():
            if name in vars(type(self)) or hasattr(self, name):
                raise ValueError(f"a value of the state can't be called {name!r}: choose another name.")
            setattr(self, name, value)

    def commit(self) -> None:
        """Stop this call of the function, on all workers at once, if workers were added or are about to go.

        Call it after each step. It sends nothing: the news comes with an outer step. Nothing has to be kept for a lost
        worker, because the survivors never go back.

        Raises:
            horovod.common.exceptions.HostsUpdatedInterrupt: `run` catches it, and calls the function again.
        """
        if any(optimizer.agreed() for optimizer in self._optimizers):
            from horovod.common.exceptions import HostsUpdatedInterrupt

            raise HostsUpdatedInterrupt(False)

    def register_reset_callbacks(self, callbacks: Sequence[Callable[[], None]]) -> None:
        """Call these whenever workers have come or gone, before all come together and the function is called again."""
        self._callbacks += callbacks

    def sync(self) -> None:
        """Bring the present workers together, and give all of them the leader's values. A collective."""
        started = time.monotonic() if self._noticed is None else self._noticed
        together = [optimizer.come_together() for optimizer in self._optimizers]
        comm, order, newcomers, behind = together[0]
        self._take_values(comm.scoped("state"), order)
        change = Change(self._optimizers[0].steps, comm.size, newcomers, behind, time.monotonic() - started)
        self.changes.append(change)
        self._noticed = None
        if self._news.is_set():  # while they came together
            self._tell()

    def notice(self) -> None:
        """Note that the workers are about to change, and end what is in flight."""
        self._noticed = time.monotonic()
        for optimizer in self._optimizers:
            optimizer.leave()

    def on_reset(self) -> None:
        """Call the callbacks; the transport is ready again."""
        for callback in self._callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update: Any) -> None:
        """Take the launcher's news, in a thread of Horovod's."""
        self._news.set()
        self._tell()

    def forget_news(self) -> None:
        """Take all news for known: the workers that come now are those that it was about."""
        self._news.clear()

    @property
    def steps(self) -> int:
        """Inner steps of all optimizers together."""
        return sum(optimizer.steps for optimizer in self._optimizers)

    def _take_values(self, comm: ScopedComm, order: Sequence[int]) -> None:
        """Take the values of the first worker, and those of a framework's own from its first worker. A collective.

        Args:
            order: all ranks, first those whose values count.

        Raises:
            ValueError: on every worker, if the names of the values differ between two of one framework.
        """
        everyone = comm.gather("names", (self.framework, self._names))
        givers: dict[str, int] = {}
        for rank in order:
            framework, names = everyone[rank]
            giver = givers.setdefault(framework, rank)
            if set(names) != set(everyone[giver][1]):
                raise ValueError(
                    f"the states of rank {comm.ranks[giver]} and rank {comm.ranks[rank]} have different values: "
                    f"{', '.join(everyone[giver][1]) or 'none'} and {', '.join(names) or 'none'}."
                )
        received = comm.gather("values", self._packed() if comm.rank in givers.values() else None)
        common = {name: value for name, (has_state, value) in received[order[0]].items() if not has_state}
        for name, (has_state, value) in received[givers[self.framework]].items():
            # On the giver too: a sampler deals anew when it loads.
            self._set(name, pickle.loads(value if has_state else common.get(name, value)))

    def _packed(self) -> dict[str, tuple[bool, bytes]]:
        """Return, of each value, whether it has a state, and the value or its state as bytes.

        One by one: only workers of its framework may be able to unpack what one framework alone has.
        """
        return {name: (_has_state(getattr(self, name)), pickle.dumps(self._value(name))) for name in self._names}

    def _tell(self) -> None:
        for optimizer in self._optimizers:
            optimizer.hear()

    def _value(self, name: str) -> Any:
        value = getattr(self, name)
        return value.state_dict() if _has_state(value) else value

    def _set(self, name: str, value: Any) -> None:
        present = getattr(self, name)
        if _has_state(present):
            present.load_state_dict(value)
        else:
            setattr(self, name, value)


def _has_state(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def run_with(
    module: str, lost: Callable[[Exception], bool] = lambda _: False
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Return the decorator for functions that train in an elastic job.

    Args:
        module: Horovod's for a framework, "horovod.torch" say.
        lost: returns whether an error is one of Horovod's in the framework's own words.
    """

    def run(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def wrapper(state: ElasticState, *args: Any, **kwargs: Any) -> T:
            if not isinstance(state, ElasticState):
                raise TypeError(
                    "the function must be called with a slowmo.elastic.State as its first argument. Received: "
                    f"{type(state).__name__}"
                )
            if not elastic():  # a loss ends the job; its last checkpoint resumes it
                state.sync()
                return function(state, *args, **kwargs)
            return _run(importlib.import_module(module), state, lambda: function(state, *args, **kwargs), lost)

        return wrapper

    return run


def _run(hvd: Any, state: ElasticState, function: Callable[[], T], lost: Callable[[Exception], bool]) -> T:
    from horovod.common.elastic import notification_manager
    from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt

    notification_manager.init()
    notification_manager.register_listener(state)
    watchdog = Watchdog(horovods_limit() or math.inf, others_wait, lambda: state.steps)
    watchdog.start()
    try:
        while True:
            try:
                watchdog.training(True)
                state.sync()
                return function()
            except HostsUpdatedInterrupt:
                logger.info("workers were added or are about to go: all come together again.")
            except Exception as error:
                if not isinstance(error, HorovodInternalError) and not lost(error):
                    raise
                logger.warning("%s. The workers that are left come together again.", error)
            watchdog.training(False)
            state.notice()
            hvd.shutdown()
            state.forget_news()
            hvd.init()
            state.on_reset()
    finally:
        watchdog.stop()
        notification_manager.remove_listener(state)
