"""Finding the workers that are gone, after a collective of torch.distributed has failed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch.distributed import distributed_c10d

_SECONDS = 2.0
"""Time in which the others report. Each of them has noticed: all close their connections when one does."""

_PAUSE_S = 0.02


def lost_ranks(ranks: Sequence[int], own: int, store: Any = None) -> tuple[int, ...]:
    """Report this worker to the others, and return the ranks that don't report themselves within two seconds.

    The error of a transport has an address at best.

    Args:
        ranks: global ranks of the workers.
        own: place of this worker in `ranks`.
        store: where they report; None for torch.distributed's, which outlives the workers under torchrun.

    Returns:
        Nothing where the store can't be reached: it may have been on the worker that is gone.

    Example:
        >>> from torch.distributed import HashStore
        >>> lost_ranks((0, 1), 0, HashStore())
        (1,)
    """
    try:
        store = distributed_c10d._get_default_store() if store is None else store
        missing = {rank: f"hvd_slowmo/failed/{'_'.join(map(str, ranks))}/{rank}" for rank in ranks}
        store.set(missing.pop(ranks[own]), "1")
        end = time.monotonic() + _SECONDS
        while missing and time.monotonic() < end:
            missing = {rank: key for rank, key in missing.items() if not store.check([key])}
            time.sleep(_PAUSE_S)
    except Exception:  # whatever becomes of a store whose owner is gone
        return ()
    return tuple(missing)
