"""What the workers know of each other when they meet: a table with a row per worker.

It travels as one small float64 vector, started together with the first chunk and read before anything is written. A
worker fills its own row and leaves zeros elsewhere, so that the sum is the table, NaN and all: 0 + NaN stays in its
row. Everyone decides with the table, never with its own numbers, so that everyone decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hvd_slowmo.core.ops import Ops

TRAINING, AVERAGE = 0, 1  # why a worker came: an outer step or a join, or averaged_parameters()


class Row(NamedTuple):
    """One worker's row; the sums of rates of its block, one per parameter group, stand behind it."""

    step: Any  # the block's end at which it meets
    purpose: Any  # TRAINING or AVERAGE
    live: Any  # 1 while it trains, 0 in a join
    leaving: Any  # 1: it joins for the last time
    finite: Any  # 1: all its parameters are finite
    share: Any  # its weight in the mean: own inner steps since the last average / tau
    attends: Any  # its weight in plain means: 1, or 0 if it is left out
    taken: Any  # inner steps that it has completed
    covered: Any  # inner steps that its sums of rates cover
    drift: Any  # its squared distance from the mean at the outer step before, where that is measured


STEP, PURPOSE, LIVE, LEAVING, FINITE, SHARE, ATTENDS, TAKEN, COVERED, DRIFT = range(len(Row._fields))
RATES = len(Row._fields)
_SAME_RATE = 1e-6  # relative; sums of equal rates may differ by rounding between frameworks


class Verdict(NamedTuple):
    """What the table says, the same on every worker."""

    bad: Any  # bool: nothing may be written, see `complaint`
    odd: Any  # bool: worth a warning, see `oddity`
    live: Any  # how many workers train
    weight: Any  # sum of the workers' shares
    attendance: Any  # sum of their weights in plain means
    gamma: Any  # mean rate of the block per parameter group: sum of sums / sum of steps


def own_row(ops: Ops, rank: int, size: int, row: Sequence[Any], rates: Any) -> list[Any]:
    """A worker's contribution to a table of rows and rates: its own row between zeros; parts for `Ops.pack`."""
    width = len(row) + rates.shape[0]
    before, behind = ops.vector([0.0] * rank * width), ops.vector([0.0] * (size - 1 - rank) * width)
    return [before, *row, rates, behind]


def verdict(ops: Ops, table: Any, nonfinite: str) -> Verdict:
    """Judge a table of shape (workers, 10 + groups); nonfinite is the config's."""
    rates, live = table[:, RATES:], table[:, LIVE]
    workers, living, weight = ops.total(live * 0 + 1), ops.total(live), ops.total(table[:, SHARE])
    valid = (rates >= 0) & (rates < math.inf)  # false for NaN too
    wrong = (
        ops.total(ops.where(table[:, STEP] == table[0, STEP], 0.0, 1.0))
        + ops.total(ops.where(table[:, PURPOSE] == table[0, PURPOSE], 0.0, 1.0))
        + ops.total(ops.total(ops.where(valid, 0.0, 1.0)))
    )
    finite = ops.total(table[:, FINITE])
    # Left out are workers that bring no finite values; somebody must remain whose values count.
    enough = (finite > 0) & ((living == 0) | (weight > 0)) if nonfinite == "exclude" else finite == workers
    bad = (wrong > 0) | (ops.where(enough, 0.0, 1.0) > 0)
    rates = ops.where(valid, rates, 0.0)
    usual = ops.total(rates * live[:, None]) / ops.where(living > 0, living, 1.0)
    apart = (rates - usual) * (rates - usual) > (_SAME_RATE * usual) * (_SAME_RATE * usual)
    odd = ops.total(ops.total(ops.where(apart, 1.0, 0.0) * live[:, None])) > 0
    steps = ops.total(table[:, COVERED])
    gamma = ops.total(rates) / ops.where(steps > 0, steps, 1.0)
    return Verdict(bad, odd, living, weight, ops.total(table[:, ATTENDS]), gamma)


def complaint(ranks: Sequence[int], name: str) -> Callable[[Any], str]:
    """What is wrong in a table that `verdict` calls bad: the message, naming ranks, and what to do."""

    def describe(table: Any) -> str:
        if any(table[:, PURPOSE] != table[0, PURPOSE]):
            here = [f"rank {r} is {_place(row)}" for r, row in zip(ranks, table, strict=True)]
            return (
                f"{name}: the workers are not in the same place: {', '.join(here)}. "
                "averaged_parameters() is a collective: call it on every rank, after the same step."
            )
        if any(table[:, STEP] != table[0, STEP]):
            steps = [f"rank {r} step {int(s)}" for r, s in zip(ranks, table[:, STEP], strict=True)]
            return (
                f"{name}: the workers are not at the same step: {', '.join(steps)}. Call step() equally often on "
                "every rank or join() after uneven data, and resume from checkpoints of one step."
            )
        for r, row in zip(ranks, table[:, RATES:], strict=True):
            for group, rate in enumerate(row):
                if not 0 <= rate < math.inf:
                    return (
                        f"{name}: a learning rate on rank {r} is not a finite number >= 0: the sum over the block in "
                        f"parameter group {group} is {rate}. Nothing was written; look at the scheduler there."
                    )
        return (
            f"{_not_finite(ranks, name, table)}. Nothing was written, every worker still has its own parameters. "
            "A lower learning rate, gradient clipping or a loss scaler may help."
        )

    return describe


def _not_finite(ranks: Sequence[int], name: str, table: Any) -> str:
    broken = [f"rank {r}" for r, finite in zip(ranks, table[:, FINITE], strict=True) if finite != 1]
    return (
        f"{name}: parameters or BatchNorm statistics are not finite (NaN or infinity) on {', '.join(broken)} "
        f"after step {int(table[0, STEP])}"
    )


def _place(row: Any) -> str:
    if row[PURPOSE] == AVERAGE:
        return "in averaged_parameters()"
    return "at an outer step" if row[LIVE] else "in join()"


def oddity(ranks: Sequence[int], name: str) -> Callable[[Any], str]:
    """The warning about learning rates that differ between workers that train."""

    def describe(table: Any) -> str:
        living = [(r, row[RATES:] / row[COVERED]) for r, row in zip(ranks, table, strict=True) if row[LIVE]]
        seen = [f"rank {r}: {', '.join(f'{rate:.6g}' for rate in rates)}" for r, rates in living]
        return (
            f"{name}: the workers' learning rates differ (mean of the block; {'; '.join(seen)}). The outer step uses "
            "their mean on every worker. Usually this is a mistake: a scheduler driven by each worker's own loss."
        )

    return describe


def exclusion(ranks: Sequence[int], name: str) -> Callable[[Any], str]:
    """The warning about workers that are left out of an average."""

    def describe(table: Any) -> str:
        what = _not_finite(ranks, name, table)
        return f"{what}; left out of the average (nonfinite='exclude'), gets the others' result."

    return describe
