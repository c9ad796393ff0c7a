"""The outer step of a tile, as far as it is the same wherever anchor and momentum lie."""

from __future__ import annotations

from typing import Any

from hvd_slowmo.core.average.exchange import Exchange
from hvd_slowmo.core.average.ledger import RATES, verdict
from hvd_slowmo.core.average.two_phase import OuterStep
from hvd_slowmo.core.parts.layout import Chunk, Tile
from hvd_slowmo.core.parts.outer_update import Momentum, momentum
from hvd_slowmo.core.parts.progress import Scalar
from hvd_slowmo.core.parts.runtime import Runtime


def tile_step(
    runtime: Runtime, tile: Tile, mean: Any, anchor: Any, v: Any, coefficients: Momentum, entered: Scalar
) -> tuple[Any, Any]:
    """Return the new anchor and v of a tile, whose memory may be used.

    Args:
        mean, anchor, v: of the tile; v is None without momentum.
        coefficients: of all parameter groups.
        entered: true where values from outside have come since the workers were last equal.
    """
    config, ops = runtime.config, runtime.ops
    stored = runtime.store.as_stored(tile, anchor)
    if stored is not anchor and not config.delay:
        # The block began at what half precision kept of the anchor. The rounding is no progress of the block: given
        # back to the mean, it stays out of Delta = anchor - mean and so out of the momentum. After a late exchange
        # each worker begins elsewhere, and roundings cancel in the mean.
        own_mean, rounding = mean, anchor - stored
        mean = mean + rounding
        if runtime.watches:  # values from outside have nothing to do with the old anchor
            mean = ops.choose(entered, lambda: own_mean, mean)
    if runtime.watches:  # values from outside are no progress of the block: it begins at the mean
        mine = v
        anchor = ops.choose(entered, lambda: mean + 0, anchor)
        v = None if mine is None else ops.choose(entered, lambda: mine * 0, mine)
    own = Momentum(*(ops.cast_like(c[tile.group], mean) for c in coefficients))
    new_anchor, new_v = runtime.kernels.outer_update(config, mean, anchor, v, own)
    return new_anchor, new_v


def slice_step(runtime: Runtime, exchange: Exchange, table: Any) -> OuterStep:
    """Return the outer step of a slice of a chunk, from the workers' rows in the ledger, before its verdict.

    Args:
        exchange: the meeting.
        table: a row per worker.
    """
    ops, config, fragment = runtime.ops, runtime.config, exchange.purpose.fragment
    assert fragment is not None, "an outer step is about one fragment"

    def take(part: Chunk, mean: Any, anchor: Any, v: Any) -> tuple[Any, Any]:
        found = verdict(ops, table[:, : RATES + runtime.layout.group_count], config.nonfinite)
        coefficients = momentum(config, ops, found.gamma, exchange.progress.gamma[fragment])
        anchors, momenta = [], []
        for tile in part.tiles(runtime.kernels.tile):
            own_v = None if v is None else part.cut(v, tile)
            cut = part.cut(mean, tile), part.cut(anchor, tile)
            new_anchor, new_v = tile_step(runtime, tile, *cut, own_v, coefficients, found.entered)
            anchors.append(new_anchor)
            momenta.append(new_v)
        return ops.joined(anchors), None if v is None else ops.joined(momenta)

    return take
