"""Outer steps: the workers' mean, slow momentum on top, and what of it each worker writes to its own tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

from hvd_slowmo.core.average.meeting import Meeting, Meetings
from hvd_slowmo.core.average.mixing import Mixing
from hvd_slowmo.core.average.tile_step import tile_step
from hvd_slowmo.core.parts.layout import Chunk, Stretch, Tile
from hvd_slowmo.core.parts.outer_update import Momentum, momentum, next_gamma
from hvd_slowmo.core.parts.progress import Progress, Scalar, Vector
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.step.metrics import Observer
from hvd_slowmo.wire.tensors import Role


class OuterSteps:
    """One worker's outer steps.

    Args:
        runtime: of this worker.
        meetings, mixing: of this worker.
    """

    def __init__(self, runtime: Runtime, meetings: Meetings, mixing: Mixing) -> None:
        self._runtime, self._config, self._layout = runtime, runtime.config, runtime.layout
        self._ops, self._store = runtime.ops, runtime.store
        self._meetings, self._mixing = meetings, mixing
        self._tiles: dict[tuple[int, int, int], tuple[Tile, ...]] = {}  # by chunk, start and stop

    def take_anchor(self) -> None:
        """Set the anchor to the model, if the outer step needs one: a block begins here."""
        if self._config.vectors:
            for chunk in self._layout.parameter_chunks:
                self._set("anchor", chunk)

    def begin_anew(self) -> None:
        """Set the anchor to the model, without momentum, and owe nothing."""
        self.take_anchor()
        for vector in {*self._config.vectors, *self._config.sliced_vectors} - {"anchor"}:
            for chunk in self._layout.parameter_chunks:
                if self._runtime.slices.keeps(vector, chunk.index):
                    self._store.write_slice(vector, chunk.index, self._store.read_slice(vector, chunk.index) * 0)
                elif vector in self._config.vectors:
                    self._store.write(vector, chunk, self._store.read(vector, chunk) * 0)

    def _set(self, vector: str, chunk: Chunk) -> None:
        """Set a chunk of a vector to the model, or this worker's slice of it."""
        slices = self._runtime.slices
        if not slices.keeps(vector, chunk.index):
            self._store.write(vector, chunk, self._store.read("model", chunk))
            return
        part = slices.part(chunk)
        if part is not None:
            values = self._runtime.codec.padded(self._store.read("model", part), slices.lengths[chunk.index])
            self._store.write_slice(vector, chunk.index, values * 1)

    def begin_block(self, decided: Scalar) -> None:
        """Reset the inner state (line 2 of Algorithm 1) once `decided` is known: nothing can be refused any more."""
        if self._config.inner_state == "reset" and self._config.tau is not None:
            self._ops.after(decided, self._store.reset_inner_state)

    def take(self, meeting: Meeting, progress: Progress) -> Progress:
        """Take lines 6 to 8 of Algorithm 1, and line 2 of the block that follows."""
        if not self._config.average:
            return self._take_alone(meeting, progress)
        ops, purpose, gamma = self._ops, meeting.exchange.purpose, meeting.verdict.gamma
        assert purpose.fragment is not None, "an outer step is about one fragment"
        if not purpose.late and self._meetings.written is None:  # else it is taken again
            self._store.mark_block(purpose.fragment)
            self._meetings.written = set() if self._meetings.tracks else None
        coefficients = momentum(self._config, ops, gamma, progress.gamma[purpose.fragment])
        # What the ledger completes is known since this worker sent its row.
        observed = meeting.exchange.progress.observed
        observer, divide = Observer(self._runtime, observed), self._runtime.kernels.divide
        observer.own(purpose.fragment, purpose.late)
        roles: tuple[Role, ...] = ("parameter", "statistic", "optimizer_state")
        for chunk, total, weight in self._meetings.sums(meeting, roles, observer.slice):
            divisor = ops.cast_like(weight, total)
            if self._runtime.observe and chunk.role == "parameter":
                total, divisor = total / divisor, 1  # the sum may lie where the own values are read to
                observer.chunk(chunk, total, "in_flight" if purpose.late else "model")
            if chunk.role == "parameter" and self._config.vectors and not self._stepped(chunk):
                for tile in self._tiles_of(chunk):
                    self._update(tile, divide(chunk.cut(total, tile), divisor), coefficients, meeting)
            else:
                self._move_to(chunk, divide(total, divisor), meeting)
        self._store.settle(purpose.fragment)
        self.begin_block(meeting.verdict.weight)
        done = self._without_excluded(meeting, progress)
        done = self._block_done(done, purpose.fragment, gamma, observer.completed(meeting), purpose.late)
        return done if purpose.late else done._replace(since=ops.put(done.since, purpose.fragment, 0))

    def _take_alone(self, meeting: Meeting, progress: Progress) -> Progress:
        """Take an outer step from this worker's own parameters, without the average (noaverage)."""
        steps = progress.rate_steps[0]
        gamma = progress.rate_sums[0] / self._ops.where(steps > 0, steps, 1)
        coefficients = momentum(self._config, self._ops, gamma, progress.gamma[0])
        observer = Observer(self._runtime, progress.observed)
        for chunk in self._layout.parameter_chunks if self._config.vectors else ():
            if self._runtime.observe:  # there is no mean: measured from the own parameters
                observer.chunk(chunk, self._store.read("model", chunk))
            for tile in self._tiles_of(chunk):
                z = self._update(tile, self._store.read("model", tile), coefficients, meeting)
                self._mixing.follow_outer_step(tile, z, progress.mixing)
        self._store.settle()
        self.begin_block(progress.step)
        return self._block_done(progress, 0, gamma, observer.completed())

    def take_mean(self, meeting: Meeting, progress: Progress) -> Progress:
        """Set the parameters and statistics to the workers' mean; nothing else changes."""
        self._meetings.write_mean(meeting)
        if self._runtime.watches:
            self._ops.cond(meeting.verdict.entered, self.begin_anew, lambda: None)
        self._store.settle(equal=True)
        return self._without_excluded(meeting, progress)._replace(mixing=self._mixing.initial())

    def _block_done(
        self, progress: Progress, fragment: int, gamma: Vector, observed: Vector, late: bool = False
    ) -> Progress:
        ops = self._ops
        following = next_gamma(ops, gamma, progress.gamma[fragment])
        done = progress._replace(gamma=ops.put(progress.gamma, fragment, following), observed=observed)
        if late:  # the next block has begun at the launch
            return done
        return done._replace(
            rate_steps=ops.put(done.rate_steps, fragment, 0),
            rate_sums=ops.put(done.rate_sums, fragment, done.rate_sums[fragment] * 0),
            mixing=self._mixing.initial() if self._config.average else done.mixing,
        )

    def _update(self, tile: Tile, mean: Any, coefficients: Momentum, meeting: Meeting) -> Any:
        """Update a tile of the model, the anchor and v; return the new anchor."""
        v = self._store.read("v", tile) if "v" in self._config.vectors else None
        anchor, v = tile_step(
            self._runtime, tile, mean, self._store.read("anchor", tile), v, coefficients, meeting.verdict.entered
        )
        self._move_to(tile, anchor, meeting)
        self._store.write("anchor", tile, anchor)
        if v is not None:
            self._store.write("v", tile, v)
        return anchor

    def _stepped(self, chunk: Chunk) -> bool:
        """Return whether the owner of each slice of this chunk has taken its outer step."""
        return self._config.shards and self._layout.segments[chunk.segment].sliced

    def _move_to(self, stretch: Stretch, value: Any, meeting: Meeting) -> None:
        """Set the model to a common value, and keep what this worker has trained since it sent its own."""
        if meeting.exchange.purpose.late:
            kept = value + (self._store.read("model", stretch) - self._store.read("in_flight", stretch))
            if self._config.nonfinite == "exclude":
                common = value
                kept = self._ops.choose(meeting.exchange.finite == 0, lambda: common, kept)
            value = kept
        self._store.write("model", stretch, value)

    def _tiles_of(self, chunk: Chunk) -> tuple[Tile, ...]:
        key = (chunk.index, chunk.start, chunk.stop)
        if key not in self._tiles:
            self._tiles[key] = tuple(chunk.tiles(self._runtime.kernels.tile))
        return self._tiles[key]

    def _without_excluded(self, meeting: Meeting, progress: Progress) -> Progress:
        """Reset the inner state of an excluded worker, which is stale beside the others' parameters."""
        if self._config.nonfinite != "exclude":
            return progress

        def start_again() -> Progress:
            if self._config.inner_state != "average" or self._layout.fragments > 1:
                # With one fragment the mean has just replaced it; with several it travels with the last one only.
                self._ops.after(meeting.exchange.finite, self._store.reset_inner_state)
            for chunk in self._layout.parameter_chunks if self._layout.fragments > 1 else ():
                self._return_to_common(chunk, progress, meeting)
            if self._layout.fragments > 1:
                self._store.settle(meeting.exchange.purpose.fragment)  # what has been written to them
            return progress._replace(excluded=progress.excluded + 1)

        return self._ops.cond(meeting.exchange.finite == 0, start_again, lambda: progress)

    def _return_to_common(self, chunk: Chunk, progress: Progress, meeting: Meeting) -> None:
        """Give an excluded worker finite values in the fragments that have not met: with one broken all soon are.

        The anchor; or, of a fragment in flight, what was sent, so that no local progress is kept when it lands. What
        was sent broken is excluded then.
        """
        ops, store, fragment = self._ops, self._store, meeting.exchange.purpose.fragment
        if chunk.fragment == fragment:
            return
        common = store.read("anchor", chunk)
        if self._config.delay:
            flying = progress.flight.launched[chunk.fragment] > 0
            common = ops.choose(flying, partial(store.read, "in_flight", chunk), common)
        if fragment is None:  # in a join it has the workers' mean, where anybody has steps
            averaged = meeting.totals[chunk.fragment] > 0
            common = ops.choose(averaged, partial(store.read, "model", chunk), common)
        store.write("model", chunk, common)
