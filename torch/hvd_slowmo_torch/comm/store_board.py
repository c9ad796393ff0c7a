"""The store of torch.distributed as a board on which workers report after a failure."""

from __future__ import annotations

from typing import Any

from torch.distributed import distributed_c10d


class StoreBoard:
    """`hvd_slowmo.comm.absence.Board` in a store of torch.distributed.

    Args:
        store: None for the default one, which outlives the workers under torchrun.

    Example:
        >>> from torch.distributed import HashStore
        >>> board = StoreBoard(HashStore())
        >>> board.mark("0_1/1")
        >>> board.marked("0_1/1"), board.marked("0_1/0")
        (True, False)
    """

    def __init__(self, store: Any = None) -> None:
        self._store = store

    def mark(self, key: str) -> None:
        self._found().set(_path(key), "1")

    def marked(self, key: str) -> bool:
        return bool(self._found().check([_path(key)]))

    def _found(self) -> Any:
        return distributed_c10d._get_default_store() if self._store is None else self._store


def _path(key: str) -> str:
    return f"hvd_slowmo/failed/{key}"
