"""The layout of the messages: tensors laid end to end as flat vectors, and cut into chunks.

A segment is one flat vector of one type on one device. A chunk is a stretch of a segment: one message. A tile is a
stretch of a chunk in one parameter group, whose learning rate is one number; tiles are updated one at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar

from hvd_slowmo.wire.tensors import Role, TensorSpec

CHUNK_BYTES = 16 * 2**20
"""Length of a message. Long enough that the network's speed counts and not the number of messages (3 to 9 ms each on
loopback), short enough that one chunk is updated while the next travels; see benchmarks/."""

TRAVELLING: tuple[Role, ...] = ("parameter", "statistic", "optimizer_state")
"""Roles of the tensors that are averaged, in the order of their segments."""

ITEMSIZE = {"float32": 4, "float64": 8}

BLOCK = 1024
"""Elements that share a scale in few bits. Long chunks of fragments end at whole blocks, also since TensorFlow copies a
part of a tensor that begins or ends elsewhere."""


class Ref(Protocol):
    """An adapter's reference to one of its tensors."""

    @property
    def spec(self) -> TensorSpec:
        """The tensor as it travels."""

    @property
    def device(self) -> str:
        """Its device; tensors of one segment are on one."""


R = TypeVar("R", bound=Ref)


@dataclass(frozen=True)
class ParameterGroups:
    """The parameter groups that all workers have in common.

    Frameworks and scripts may group the same parameters differently. Two parameters are in one common group if they are
    in one group on every worker, so that a common group has one learning rate everywhere.

    Attributes:
        of: the common group of each parameter, in wire order.
        own: this worker's own group, for each common one.
    """

    of: tuple[int, ...]
    own: tuple[int, ...]

    @classmethod
    def single(cls, parameters: int) -> ParameterGroups:
        """Return one group of all parameters."""
        return cls((0,) * parameters, (0,))

    def common(self, own: int) -> int | None:
        """Return a common group with the rates of this worker's own one; None if none of its parameters travels."""
        return self.own.index(own) if own in self.own else None


@dataclass(frozen=True)
class Segment:
    """Tensors that travel as one flat vector of `dtype` on `device`; all have one role."""

    role: Role
    dtype: str
    device: str
    tensors: tuple[TensorSpec, ...]
    sliced: bool = False
    """It travels in slices: each worker takes the mean of one, and sends it to all."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.offsets[-1]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each tensor, and last the end of the segment."""
        return (0, *accumulate(tensor.size for tensor in self.tensors))

    def extends(self, other: Segment) -> bool:
        """Return whether this is that segment of an earlier layout, perhaps with more tensors at its end."""
        own, earlier = ((s.role, s.dtype, s.device, s.sliced, s.tensors[0].dtype) for s in (self, other))
        return own == earlier


@dataclass(frozen=True)
class Tile:
    """Elements start .. stop - 1 of a segment, in one parameter group; `index` is its chunk's."""

    index: int
    segment: int
    role: Role
    start: int
    stop: int
    group: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class Chunk:
    """Elements start .. stop - 1 of a segment: one message."""

    index: int
    segment: int
    role: Role
    start: int
    stop: int
    runs: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)  # (group, start, stop)
    fragment: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def tiles(self, length: int | None = None) -> Iterator[Tile]:
        """Yield the chunk in tiles of at most `length` elements; None: as long as the groups allow."""
        for group, first, last in self.runs:
            for start in range(first, last, length or last - first):
                stop = min(start + (length or last - first), last)
                yield Tile(self.index, self.segment, self.role, start, stop, group)

    def part(self, start: int, stop: int) -> Chunk:
        """Return elements start .. stop - 1 of the segment, which are within this chunk, as a chunk of that number."""
        clipped = tuple((group, max(start, first), min(stop, last)) for group, first, last in self.runs)
        return replace(self, start=start, stop=stop, runs=tuple(run for run in clipped if run[1] < run[2]))

    def cut(self, values: Any, tile: Tile) -> Any:
        """Return those of this chunk's values that belong to a tile of it."""
        return values[tile.start - self.start : tile.stop - self.start]


Stretch = Chunk | Tile
"""Consecutive elements of one segment."""


@dataclass(frozen=True)
class Layout:
    """All segments of a model, and their chunks in the order of the segments; see `in_turn`.

    Attributes:
        groups: the parameter group of each parameter, in the order of the segments.
        group_count: number of parameter groups.
        fragments: number of sets of chunks, each of which is exchanged at steps of its own. Chunks of parameters are
            dealt in turn, so that a fragment has parts of early and late layers; all others travel with the last one.
    """

    segments: tuple[Segment, ...]
    chunks: tuple[Chunk, ...]
    groups: tuple[int, ...]
    group_count: int
    fragments: int = 1

    @property
    def parameter_chunks(self) -> list[Chunk]:
        """The chunks of parameters, in wire order."""
        return [chunk for chunk in self.chunks if chunk.role == "parameter"]

    @cached_property
    def in_turn(self) -> tuple[Chunk, ...]:
        """The chunks fragment by fragment: the order in which they travel, all or those of one fragment."""
        return tuple(sorted(self.chunks, key=lambda chunk: chunk.fragment))

    def of_fragment(self, number: int) -> list[Chunk]:
        """The chunks of a fragment, in wire order."""
        return [chunk for chunk in self.chunks if chunk.fragment == number]

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in wire order."""
        return [spec.name for segment in self.segments for spec in segment.tensors]

    def spans(self, stretch: Stretch) -> Iterator[tuple[int, int, int, int]]:
        """Yield the tensors under a stretch: (number in the segment, from, to in the tensor, place in the stretch)."""
        return spans(self.segments[stretch.segment].offsets, stretch.start, stretch.stop)

    def describe(self) -> list[tuple[Any, ...]]:
        """Return what workers must agree on, tensor by tensor, in wire order."""
        groups = iter(self.groups)
        return [
            (segment.role, spec.name, list(spec.shape), spec.dtype, next(groups) if segment.role == "parameter" else 0)
            for segment in self.segments
            for spec in segment.tensors
        ]


@dataclass(frozen=True)
class ModelLayout(Generic[R]):
    """The layout of a model and, per segment, where the adapter finds its tensors."""

    layout: Layout
    refs: tuple[tuple[R, ...], ...]

    def refs_of(self, *roles: Role) -> list[R]:
        """Return the refs of the segments with these roles, in wire order."""
        pairs = zip(self.layout.segments, self.refs, strict=True)
        return [ref for segment, refs in pairs if segment.role in roles for ref in refs]

    def regrouped(self, groups: ParameterGroups, specs: Sequence[TensorSpec]) -> ModelLayout[R]:
        """Return the same layout with other parameter groups; messages stay as they are.

        Args:
            groups: of the parameters among `specs`.
            specs: in the order in which they were laid out.
        """
        parameters = [id(spec) for spec in specs if spec.role == "parameter"]
        of = dict(zip(parameters, groups.of, strict=True))
        segments = self.layout.segments
        grouped = tuple(of[id(spec)] for segment in segments if segment.role == "parameter" for spec in segment.tensors)
        stops = [chunk.stop for chunk in self.layout.chunks]
        return replace(self, layout=_cut(segments, grouped, len(groups.own), stops, self.layout.fragments))


def lay_out(
    refs: Iterable[R],
    groups: ParameterGroups,
    chunk_bytes: int = CHUNK_BYTES,
    fragments: int = 1,
    sliced: Callable[[TensorSpec], bool] = lambda spec: False,
) -> ModelLayout[R]:
    """Lay tensors end to end: those of one role, type and device together, in the order given.

    Parameters of different types have segments of their own, whatever their wire types: what is written back is rounded
    to the parameters' type. Statistics of all types travel together. Segments stand in the order of roles and types, so
    that the order of the tensors does not change the length of the messages.

    Args:
        refs: the tensors; frozen ones take no part.
        groups: of the parameters among them.
        chunk_bytes: the greatest length of a message.
        fragments: see `Layout`; messages are so short that each fragment gets one.
        sliced: tells of a parameter whether it travels in slices; the others have segments of their own.

    Raises:
        ValueError: no parameter with an element.
    """
    numbers = iter(groups.of)
    together: dict[tuple[Role, str, str, str, bool], list[tuple[R, int]]] = {}
    for ref in refs:
        spec = ref.spec
        if spec.role == "frozen":
            continue
        own = spec.wire_dtype if spec.role == "statistic" else spec.dtype
        group = next(numbers) if spec.role == "parameter" else 0
        cut = spec.role == "parameter" and sliced(spec)
        together.setdefault((spec.role, spec.wire_dtype, own, ref.device, cut), []).append((ref, group))
    # Stable: devices in their order.
    keys = sorted(together, key=lambda key: (TRAVELLING.index(key[0]), *key[1:3], not key[4]))
    keys = [key for key in keys if any(ref.spec.size for ref, _ in together[key])]
    segments = tuple(
        Segment(role, dtype, device, tuple(ref.spec for ref, _ in together[role, dtype, own, device, cut]), cut)
        for role, dtype, own, device, cut in keys
    )
    if all(segment.role != "parameter" for segment in segments):
        raise ValueError("the optimizer has no parameter with an element.")
    grouped = tuple(group for key in keys if key[0] == "parameter" for _, group in together[key])
    stops = [stop for segment in segments for stop in _stops(segment, segments, chunk_bytes, fragments)]
    refs_by_segment = tuple(tuple(ref for ref, _ in together[key]) for key in keys)
    return ModelLayout(_cut(segments, grouped, len(groups.own), stops, fragments), refs_by_segment)


def _stops(segment: Segment, segments: Sequence[Segment], chunk_bytes: int, fragments: int) -> Iterator[int]:
    """Yield the ends of a segment's chunks."""
    longest = max(1, chunk_bytes // ITEMSIZE[segment.dtype])
    if fragments > 1 and segment.role == "parameter":
        # As many chunks as the greatest length allows, rounded up so that every fragment gets the same number; then
        # equally long ones.
        total = sum(each.size for each in segments if each.role == "parameter")
        unit = BLOCK if longest >= 16 * BLOCK else 1
        equal = longest - (unit - 1)  # what rounding may add to a chunk
        number = fragments * -(-total // (equal * fragments))
        number = min(segment.size, -(-segment.size * number // total))
        if segment.size < number * 16 * unit:
            unit = 1
        yield from (segment.size * place // number // unit * unit for place in range(1, number))
        yield segment.size
        return
    yield from (min(start + longest, segment.size) for start in range(0, segment.size, longest))


def _cut(
    segments: Sequence[Segment], groups: tuple[int, ...], count: int, stops: Sequence[int], fragments: int
) -> Layout:
    """Cut segments into chunks that end at these places within their segments, and deal them."""
    chunks: list[Chunk] = []
    ends, numbers = iter(stops), iter(groups)
    for number, segment in enumerate(segments):
        runs = _runs(segment, lambda: next(numbers))
        start = 0
        while start < segment.size:
            stop = next(ends)
            inside = tuple(
                (group, max(start, first), min(stop, last))
                for group, first, last in runs
                if max(start, first) < min(stop, last)
            )
            # Segments of parameters stand first, so that the chunk's number deals them in turn.
            fragment = len(chunks) % fragments if segment.role == "parameter" else fragments - 1
            chunks.append(Chunk(len(chunks), number, segment.role, start, stop, inside, fragment))
            start = stop
    return Layout(tuple(segments), tuple(chunks), groups, count, fragments)


def spans(offsets: Sequence[int], begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the tensors under a stretch of tensors laid end to end.

    Args:
        offsets: start of each tensor, and last the end of all.
        begin, end: of the stretch.

    Yields:
        Number of the tensor, from and to in the tensor, place in the stretch.

    Example:
        >>> list(spans((0, 3, 3, 8), 2, 5))
        [(0, 2, 3, 0), (2, 0, 2, 1)]
    """
    number = bisect_right(offsets, begin) - 1
    while offsets[number] < end:
        start, stop = max(begin, offsets[number]), min(end, offsets[number + 1])
        if start < stop:
            yield number, start - offsets[number], stop - offsets[number], start - begin
        number += 1


def _runs(segment: Segment, next_group: Callable[[], int]) -> list[tuple[int, int, int]]:
    """Return the stretches of one parameter group: (group, start, stop)."""
    runs: list[tuple[int, int, int]] = []
    for spec, offset in zip(segment.tensors, segment.offsets, strict=False):
        group = next_group() if segment.role == "parameter" else 0
        if not spec.size:
            continue
        if runs and runs[-1][0] == group:
            runs[-1] = (group, runs[-1][1], offset + spec.size)
        else:
            runs.append((group, offset, offset + spec.size))
    return runs
