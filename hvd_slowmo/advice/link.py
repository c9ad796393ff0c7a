"""The links between the workers: the time of a collective over the length of its message."""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """Time of a collective: a latency per message and a time per byte (Hockney 1994).

    Attributes:
        latency: seconds per message.
        per_byte: seconds per byte of the vector that is summed, sent or gathered.
        work: processor seconds per byte, over all threads of one worker.

    Example:
        >>> round(Line(latency=0.001, per_byte=1e-8).seconds(1_000_000, messages=2), 6)
        0.012
    """

    latency: float
    per_byte: float
    work: float = 0.0

    def seconds(self, length: float, messages: int = 1) -> float:
        """Return the time of a vector of so many bytes, cut into messages."""
        return messages * self.latency + length * self.per_byte


class Link(NamedTuple):
    """The collectives of all workers together.

    Attributes:
        workers: number of workers, m.
        sums: of a vector, with the result on all workers.
        pushes: of a vector from each worker to another one.
        alltoalls: of a vector cut into a part for each worker.
        allgathers: of a vector of which each worker has a part.
    """

    workers: int
    sums: Line
    pushes: Line
    alltoalls: Line
    allgathers: Line


def link_of(bandwidth: float, latency: float, workers: int) -> Link:
    """Return the link on paper: each worker sends and receives at the same time, as in a ring.

    Args:
        bandwidth: bytes per second that a worker can send.
        latency: seconds until a message arrives.
        workers: m >= 2.

    Raises:
        ValueError: fewer than two workers.

    Example:
        >>> link = link_of(bandwidth=125e6, latency=0.001, workers=4)
        >>> round(link.sums.seconds(1_000_000), 6)  # 6 messages in a row, 1.5 vectors
        0.018
    """
    if workers < 2:
        raise ValueError(f"a link is one between at least 2 workers. Received: workers={workers}")
    others = workers - 1
    slices = Line(others * latency, others / workers / bandwidth)
    return Link(
        workers=workers,
        sums=Line(2 * slices.latency, 2 * slices.per_byte),
        pushes=Line(latency, 1 / bandwidth),
        alltoalls=slices,
        allgathers=slices,
    )
