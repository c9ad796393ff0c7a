"""Late exchanges: a fragment's mean is applied `delay` steps after the exchange began (Streaming DiLoCo; torchft).

    after step s       y <- x of the fragment, set aside as "in_flight"; the exchange of y begins, training goes on
    after step s + d   anchor and v are updated from the mean of y, and x <- anchor + (x - y)

Every gradient counts once: in the mean if it came before step s, in x - y otherwise. y is part of the state, so a state
may be saved at any step without communication, and a resume sends y again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvd_slowmo.core.average.exchange import Exchange, Purpose
from hvd_slowmo.core.average.meeting import Meeting, Meetings
from hvd_slowmo.core.parts.progress import Flight, Progress, Scalar, Vector
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.parts.schedule import next_fragment, steps_to_meeting
from hvd_slowmo.core.parts.store import Condition


class Flights:
    """One worker's exchanges in flight, at most one per fragment.

    Args:
        runtime: of this worker.
        meetings: of this worker.
    """

    def __init__(self, runtime: Runtime, meetings: Meetings) -> None:
        self._runtime, self._ops, self._store = runtime, runtime.ops, runtime.store
        self._meetings = meetings
        self._late = runtime.config.delay > 0
        self._begun: dict[int, Exchange] = {}  # by fragment, where an exchange can outlive a call

    def initial(self) -> Flight:
        """Return the state with nothing in flight."""
        fragments = self._runtime.layout.fragments if self._late else 0
        zeros = self._ops.vector([0.0] * fragments)
        none = self._ops.to_int(zeros)
        groups = self._runtime.layout.group_count
        sums = self._ops.reshape(self._ops.vector([0.0] * fragments * groups), (fragments, groups))
        return Flight(none, none, none, sums)

    @property
    def most(self) -> int:
        """Number of fragments that can be in flight at a time."""
        config = self._runtime.config
        return min(config.fragments, -(-config.delay * config.fragments // (config.tau or 1)))

    def first(self, flight: Flight) -> Scalar:
        """Return the fragment in flight that was launched first, where there is one."""
        ops, fragments = self._ops, self._runtime.layout.fragments
        flying = ops.where(flight.launched > 0, -flight.launched, -math.inf)
        table = ops.reshape(ops.vector([x for f in range(fragments) for x in (flying[f], f)]), (fragments, 2))
        return ops.to_int(ops.argmax_row(table, 0)[1])

    def launch(
        self, progress: Progress, fragment: int, training: int, keep: Callable[[Progress], None] = lambda _: None
    ) -> Progress:
        """Set the fragment aside, begin its exchange where it can outlive a call, and begin its next block.

        Args:
            keep: takes the state before the exchange begins, which fails where a worker was lost.
        """
        launched, condition = self.set_aside(progress, fragment, training)
        keep(launched)
        if self._ops.keeps_handles:
            self._begun[fragment] = self._begin(launched, fragment, training, condition=condition)
        return launched

    def set_aside(self, progress: Progress, fragment: int, training: int = 1) -> tuple[Progress, Condition]:
        """Do all of a launch but begin the exchange; return also the condition in which the fragment is sent."""
        ops, store = self._ops, self._store
        condition = store.condition(fragment)
        store.mark_block(fragment)
        for chunk in self._runtime.layout.of_fragment(fragment):
            # A model of another form is not looked at: the verdict will refuse it.
            store.set_aside(chunk, zeros=condition.misfit != 0)
        flight = Flight(
            launched=ops.put(progress.flight.launched, fragment, progress.step),
            # A worker that has only followed the others' steps weighs nothing.
            sent_since=ops.put(progress.flight.sent_since, fragment, progress.since[fragment] * training),
            sent_rate_steps=ops.put(progress.flight.sent_rate_steps, fragment, progress.rate_steps[fragment]),
            sent_rate_sums=ops.put(progress.flight.sent_rate_sums, fragment, progress.rate_sums[fragment]),
        )
        launched = progress._replace(
            since=ops.put(progress.since, fragment, 0),
            rate_steps=ops.put(progress.rate_steps, fragment, 0),
            rate_sums=ops.put(progress.rate_sums, fragment, progress.rate_sums[fragment] * 0),
            flight=flight,
        )
        return launched, condition

    def resume(self, progress: Progress) -> None:
        """Begin the exchanges again that a loaded state has in flight, where an exchange can outlive a call.

        All of them, in the order in which they were launched: a worker in a join finishes them before the next one
        begins, and another one after that.
        """
        if not (self._late and self._ops.keeps_handles) or self._begun:
            return
        launched = progress.flight.launched
        for fragment in launched.argsort(kind="stable").tolist():
            if launched[fragment]:
                self._begun[fragment] = self._begin(progress, fragment, training=1)

    def exchange(self, progress: Progress, fragment: int) -> list[Any]:
        """Exchange a fragment in flight, for `land`: the ledger and its chunks, as many tensors for each fragment."""
        return self._meetings.flattened(self._begin(progress, fragment, training=1))

    def nothing(self) -> list[Any]:
        """Return what `exchange` does where nothing is in flight."""
        return self._meetings.flattened(None)

    def land(
        self, progress: Progress, fragment: int, arrived: Sequence[Any] | None, undo: Callable[[], None]
    ) -> Meeting:
        """Return the meeting of a fragment in flight.

        Args:
            arrived: result of `exchange`; None without.
            undo: is called before the error, where the verdict has failed.

        Raises:
            ValueError: on every worker, where the verdict has failed; nothing is in flight any more.
        """
        if arrived is None:
            meeting = self._finish(progress, fragment, undo)
        else:
            there = self._meetings.restored(arrived, fragment)
            meeting = self._meetings.finish(self._begin(progress, fragment, 1, there), undo)
        self._store.hold(meeting.moved)
        return meeting

    def _finish(self, progress: Progress, fragment: int, undo: Callable[[], None]) -> Meeting:
        exchange = self._begun.pop(fragment, None) or self._begin(progress, fragment, training=1)
        try:
            return self._meetings.finish(exchange, undo)
        except ValueError:
            self.discard()
            self._meetings.drop_discarded()
            self.answer_launches(progress, progress.flight.launched[fragment])
            raise

    def answer_launches(self, progress: Progress, failed: Scalar) -> None:
        """Exchange what other workers launch before they know that the meeting after step `failed` has failed.

        They learn of it `delay` steps later, or in a join before that. What is due up to its own step, each worker has
        launched; the rest every worker answers, those too that come to their join meanwhile. Where no exchange outlives
        a call, others have begun none.
        """
        config = self._runtime.config
        if not self._ops.keeps_handles:
            return
        step = max(failed, progress.step)
        step += steps_to_meeting(config, step)
        while step < failed + config.delay:
            fragment = next_fragment(config, step - 1)
            purpose = Purpose(training=0, fragment=fragment, beside_late=True)
            condition = self._store.condition(fragment)
            self._meetings.exchanged(self._meetings.begin(progress, step, purpose, condition))
            step += steps_to_meeting(config, step)

    def withdrawn(self, progress: Progress) -> Progress:
        """Return the state with nothing in flight, as if it had never been sent: the blocks go on."""
        ops, flight = self._ops, progress.flight
        flying = flight.launched > 0
        sent = ops.to_int(ops.where(flying, 1.0, 0.0))
        sent_sums = ops.where(ops.reshape(flying, (self._runtime.layout.fragments, 1)), flight.sent_rate_sums, 0.0)
        if ops.keeps_handles:
            for fragment in flying.nonzero()[0]:
                self._store.unmark_block(fragment)
                for chunk in self._runtime.layout.of_fragment(fragment):
                    self._store.drop(chunk)
        return progress._replace(
            since=progress.since + flight.sent_since * sent,
            rate_steps=progress.rate_steps + flight.sent_rate_steps * sent,
            rate_sums=progress.rate_sums + sent_sums,
            flight=flight._replace(launched=flight.launched * 0),
        )

    def dropped(self, progress: Progress, fragment: int) -> Progress:
        """Exchange a fragment in flight for nothing: another worker may send its own only now. A collective."""
        begun = self._begun.pop(fragment, None) or self._begin(progress, fragment, training=1)
        self._meetings.exchanged(begun)
        return self.landed(progress, fragment)

    def overtake(self, progress: Progress, fragment: int, gamma: Vector, arrived: Mapping[int, Any]) -> Progress:
        """Finish a fragment in flight with the anchor that another worker got from the same exchange.

        The anchor is here by now. Statistics keep this worker's values, since nobody has their mean any more.

        Args:
            gamma: the exchange's mean learning rate, per parameter group.
            arrived: by chunk, the model's new values where no worker keeps the anchor whole.
        """
        store = self._store
        for chunk in self._runtime.layout.of_fragment(fragment):
            if chunk.index in arrived:
                store.write("model", chunk, arrived[chunk.index])
            elif chunk.role == "parameter":
                trained = store.read("model", chunk) - store.read("in_flight", chunk)
                store.write("model", chunk, store.read("anchor", chunk) + trained)
        store.settle(fragment)
        done = self.landed(progress, fragment)
        return done._replace(gamma=self._ops.put(done.gamma, fragment, gamma))

    @property
    def in_flight(self) -> bool:
        """True while exchanges have been started whose result has not been taken, so that others must send theirs."""
        return bool(self._begun) or self._meetings.discarded

    def landed(self, progress: Progress, fragment: int) -> Progress:
        """Return the state without the fragment's exchange; its copy is freed."""
        for chunk in self._runtime.layout.of_fragment(fragment):
            self._store.drop(chunk)
        return progress._replace(
            flight=progress.flight._replace(launched=self._ops.put(progress.flight.launched, fragment, 0))
        )

    def discard(self) -> None:
        """Never apply the exchanges in flight: another state takes the place of this one. Waits for nothing."""
        self._meetings.discard(self._begun.values())
        self._begun = {}

    def _begin(
        self,
        progress: Progress,
        fragment: int,
        training: int,
        arrived: tuple[Any, ...] = (),
        condition: Condition | None = None,
    ) -> Exchange:
        """Begin the exchange of a fragment that has been set aside, at its launch or after a resume.

        Args:
            arrived: results in the place of an exchange.
            condition: at its launch; None later.
        """
        ops, flight = self._ops, progress.flight
        sent = progress._replace(
            since=ops.put(progress.since, fragment, flight.sent_since[fragment]),
            rate_steps=ops.put(progress.rate_steps, fragment, flight.sent_rate_steps[fragment]),
            rate_sums=ops.put(progress.rate_sums, fragment, flight.sent_rate_sums[fragment]),
        )
        purpose = Purpose(training=training, counts=1, fragment=fragment, late=True)
        condition = condition or self._store.sent_condition(fragment)
        return self._meetings.begin(sent, flight.launched[fragment], purpose, condition, arrived)
