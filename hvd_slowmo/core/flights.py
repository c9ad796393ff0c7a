"""Late exchanges: a fragment's mean is applied `delay` steps after the exchange began (Streaming DiLoCo; torchft).

    after step s       y <- x of the fragment, set aside as "in_flight"; the exchange of y begins, training goes on
    after step s + d   anchor and v are updated from the mean of y, and x <- anchor + (x - y)

Every gradient counts once: in the mean if it came before step s, in x - y otherwise. y is part of the state, so a state
may be saved at any step without communication, and a resume sends y again.
"""

from __future__ import annotations

from collections.abc import Iterator

from hvd_slowmo.core.meeting import Exchange, Meeting, Meetings, Purpose
from hvd_slowmo.core.progress import Flight, Progress
from hvd_slowmo.core.runtime import Runtime


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
        self._met: dict[int, Meeting] = {}  # those whose verdict is known already

    def initial(self) -> Flight:
        """Return the state with nothing in flight."""
        fragments = self._runtime.layout.fragments if self._late else 0
        zeros = self._ops.vector([0.0] * fragments)
        none = self._ops.to_int(zeros)
        groups = self._runtime.layout.group_count
        sums = self._ops.reshape(self._ops.vector([0.0] * fragments * groups), (fragments, groups))
        return Flight(none, none, none, sums)

    def in_order(self, flight: Flight) -> Iterator[int]:
        """Yield the fragments in flight in the order in which they were launched; not in a trace."""
        launched = [int(step) for step in flight.launched]
        yield from sorted((f for f, step in enumerate(launched) if step), key=lambda f: launched[f])

    def launch(self, progress: Progress, fragment: int, training: int) -> Progress:
        """Set the fragment aside, begin its exchange where it can outlive a call, and begin its next block."""
        ops, store = self._ops, self._store
        condition = store.condition(fragment)
        store.cut(fragment)

        for chunk in self._runtime.layout.of_fragment(fragment):
            # A model of another form is not looked at: the verdict will refuse it.
            store.set_aside(chunk, zeros=condition.misfit != 0)
        flight = Flight(
            launched=ops.put(progress.flight.launched, fragment, progress.step),
            sent_since=ops.put(progress.flight.sent_since, fragment, progress.since[fragment]),
            sent_rate_steps=ops.put(progress.flight.sent_rate_steps, fragment, progress.rate_steps[fragment]),
            sent_rate_sums=ops.put(progress.flight.sent_rate_sums, fragment, progress.rate_sums[fragment]),
        )
        launched = progress._replace(
            since=ops.put(progress.since, fragment, 0),
            rate_steps=ops.put(progress.rate_steps, fragment, 0),
            rate_sums=ops.put(progress.rate_sums, fragment, progress.rate_sums[fragment] * 0),
            flight=flight,
        )
        if ops.keeps_handles:
            self._begun[fragment] = self._begin(launched, fragment, training)
        return launched

    def land(self, progress: Progress, fragment: int) -> Meeting:
        """Return the meeting of a fragment in flight.

        Raises:
            ValueError: on every worker, where the verdict has failed; nothing is in flight any more.
        """
        meeting = self._met.pop(fragment, None) or self._finish(progress, fragment)
        self._store.hold(meeting.moved)
        return meeting

    def relay(self, progress: Progress, fragment: int) -> None:
        """Start the second phase of an exchange in few bits, so that both are hidden.

        Raises:
            ValueError: as `land`.
        """
        if fragment in self._begun:
            self._met[fragment] = self._meetings.relay(self._finish(progress, fragment))

    def _finish(self, progress: Progress, fragment: int) -> Meeting:
        exchange = self._begun.pop(fragment, None)
        try:
            return self._meetings.finish(exchange or self._begin(progress, fragment, training=1))
        except ValueError:
            self.discard()
            self._meetings.drop_discarded()
            raise

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
        self._meetings.discard_relayed(self._met.values())
        self._begun, self._met = {}, {}

    def _begin(self, progress: Progress, fragment: int, training: int) -> Exchange:
        """Begin the exchange of a fragment that has been set aside, at its launch or after a resume."""
        ops, flight = self._ops, progress.flight
        sent = progress._replace(
            since=ops.put(progress.since, fragment, flight.sent_since[fragment]),
            rate_steps=ops.put(progress.rate_steps, fragment, flight.sent_rate_steps[fragment]),
            rate_sums=ops.put(progress.rate_sums, fragment, flight.sent_rate_sums[fragment]),
        )
        purpose = Purpose(training=training, counts=1, fragment=fragment, late=True)
        condition = self._store.sent_condition(fragment)
        return self._meetings.begin(sent, flight.launched[fragment], purpose, condition)
