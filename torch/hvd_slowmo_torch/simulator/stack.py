"""A stack of workers in the place of one: the core's Comm, Ops and Codec on tensors with a column per worker.

A stretch of n elements is a tensor (n, m), with a column for each of m workers, or (n, 1) where all have the same. The
core's lines are elementwise over the elements and broadcast over the columns. In memory a stack is (m, n): each worker
in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.parts.codec import Coded, Elementwise, plain
from hvd_slowmo.core.parts.layout import BLOCK
from hvd_slowmo_torch.simulator.shares import Shares
from hvd_slowmo_torch.tensors.codec import TorchCodec
from hvd_slowmo_torch.tensors.ops import TorchOps

T = TypeVar("T")
_CACHED = 2**17
"""Elements of which a few copies find place in a processor's cache."""


class StackCodec:
    """`hvd_slowmo.core.parts.codec.Codec` of stacks: each column is encoded for itself.

    A message is uint8 (m, bytes). A floating-point tensor in its place is one that has been decoded already.

    Example:
        >>> codec, g = StackCodec(), torch.stack([torch.zeros(BLOCK), torch.ones(BLOCK)], dim=1)
        >>> message = codec.encode(plain(g), 0, 1, 8)
        >>> tuple(message.shape), torch.equal(codec.decode(codec.cut(message, 8), 8), g)
        ((2, 1028), True)
    """

    tile: int | None = None

    def __init__(self) -> None:
        self._codec = TorchCodec(tile=None)

    def compute(self, vector: Elementwise, first: int, last: int) -> torch.Tensor:
        values: torch.Tensor = vector.piece(first, last)
        return values

    def encode(self, vector: Elementwise, first: int, last: int, bits: int) -> torch.Tensor:
        g = self._whole(vector, first, last)
        # In the order of the memory. Blocks are encoded one by one, so those of all workers may follow each other.
        rows = g.T.reshape(-1)
        return self._codec.encode(plain(rows), 0, len(rows) // BLOCK, bits).view(g.shape[1], -1)

    def encode_with_rest(
        self, vector: Elementwise, first: int, last: int, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values = self._whole(vector, first, last)
        message = self.encode(plain(values), 0, last - first, bits)
        return message, values - self.decode(self.cut(message, bits), bits)

    def _whole(self, vector: Elementwise, first: int, last: int) -> torch.Tensor:
        return self.padded(vector.piece(first, last), (last - first) * BLOCK)

    def cut(self, message: torch.Tensor, bits: int, first: int = 0, last: int | None = None) -> Coded:
        if not message.is_floating_point():
            codes = self._codec.cut(message.reshape(-1), bits)
            message = self._codec.decode(codes, bits).view(len(message), -1).T
        return (message[first * BLOCK : None if last is None else last * BLOCK],)

    def cut_all(self, messages: Sequence[torch.Tensor], bits: int) -> Coded:
        (message,) = messages
        return self.cut(message, bits)

    def decode(self, coded: Coded, bits: int) -> torch.Tensor:
        values: torch.Tensor = coded[0]
        return values

    def padded(self, g: torch.Tensor, elements: int) -> torch.Tensor:
        return g if len(g) == elements else torch.nn.functional.pad(g.T, (0, elements - len(g))).T


class StackComm:
    """`hvd_slowmo.comm.protocol.Comm` within a stack: one worker, whose contribution to a sum is the workers' mean.

    Scalars (1-D) are the same for all. Nothing is sent.

    Args:
        codec: of few bits.
        bits: of the messages that `start_alltoall` takes.

    Example:
        >>> StackComm(StackCodec(), 32).start_sum("model.0", torch.tensor([[1.0, 3.0], [5.0, 5.0]])).tolist()
        [[2.0], [5.0]]
    """

    rank = 0
    size = 1
    ranks = (0,)
    node: Comm | None = None

    def __init__(self, codec: StackCodec, bits: int) -> None:
        self._codec = codec
        self._bits = bits
        self._received: dict[str, torch.Tensor] = {}  # new memory takes longer than the messages

    def start_sum(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x if x.dim() == 1 else mean_of(x)

    def start_push(self, name: str, x: torch.Tensor, shares: Shares) -> torch.Tensor:
        rows = x.T
        return shares.messages(rows, self._memory_for(name, rows)).T

    def _memory_for(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Return memory for the messages of one name, which have been mixed before the next ones are sent."""
        if name not in self._received or self._received[name].shape != like.shape:
            self._received[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return self._received[name]

    def start_alltoall(self, name: str, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        (message,) = parts
        return [mean_of(self._codec.decode(self._codec.cut(message, self._bits), self._bits))]

    def start_allgather(self, name: str, x: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
        return [x]

    def open_beside(self) -> None:
        """Do nothing: nobody else has to come."""

    def start_beside(self, work: Callable[[Comm], T]) -> T:
        return work(self)

    def wait(self, handle: Any) -> Any:
        return handle

    def gather(self, name: str, item: Any) -> list[Any]:
        return [item]


class StackOps(TorchOps):
    """`hvd_slowmo.core.parts.ops.Ops` beside stacks: a factor may differ between the workers."""

    def matrices(self, array: NDArray[Any]) -> list[Shares]:
        return [Shares(dense) for dense in array]

    def cast_like(self, scalar: Any, tensor: torch.Tensor) -> Any:
        if np.ndim(scalar) == 0:
            return super().cast_like(scalar, tensor)
        return torch.from_numpy(np.ascontiguousarray(scalar)).to(tensor)


def scaled_sum_(
    x: torch.Tensor, factor: torch.Tensor, y: torch.Tensor, memory: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Do as `hvd_slowmo.core.parts.outer_update.scaled_sum`, with a factor of each worker's, in the memory given."""
    out = memory()
    if out.data_ptr() == y.data_ptr():
        return y.add_(x * factor)
    return torch.mul(x, factor, out=out).add_(y)  # addcmul takes several times as long where a factor is broadcast


def mean_of(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over the columns, (n, 1), bitwise a column where all are equal.

    Example:
        >>> mean_of(torch.full((1, 3), 0.1)).item() == torch.tensor(0.1).item()
        True
    """
    rows = x.T
    first, total = rows[:1], x.new_zeros(1, len(x))
    for some in torch.split(rows, max(1, _CACHED // max(1, len(x)))):
        total += (some - first).sum(dim=0, keepdim=True)
    return (first + total / len(rows)).T
