"""What the workers know of each other when they meet: a table with a row per worker.

It travels as one small float64 vector, started together with the first chunk and read before anything is written. A
worker fills its own row and leaves zeros elsewhere, so that the sum is the table, NaN and all: 0 + NaN stays in its
row. Everyone decides with the table, never with its own numbers, so that everyone decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hvd_slowmo.ops import Ops

OUTER, AVERAGE = 0, 1  # why a worker came
PURPOSES = {OUTER: "is at an outer step", AVERAGE: "is in averaged_parameters()"}


class Row(NamedTuple):
    """One worker's row; the sums of rates of its block, one per parameter group, stand behind it."""

    step: Any  # inner steps completed
    purpose: Any  # OUTER or AVERAGE
    live: Any  # 1 while it trains
    finite: Any  # 1: all its parameters are finite
    share: Any  # its weight in the mean: inner steps since the last average / tau
    steps: Any  # inner steps that its sums of rates cover


STEP, PURPOSE, _LIVE, FINITE, SHARE, STEPS = range(len(Row._fields))
RATES = len(Row._fields)


class Verdict(NamedTuple):
    """What the table says, the same on every worker."""

    bad: Any  # bool: nothing may be written, see `complaint`
    odd: Any  # bool: worth a warning, see `oddity`
    weight: Any  # sum of the workers' shares
    gamma: Any  # mean rate of the block per parameter group: sum of sums / sum of steps


def verdict(ops: Ops, table: Any) -> Verdict:
    """Judge a table of shape (workers, 6 + groups)."""
    rates = table[:, RATES:]
    valid = (rates >= 0) & (rates < math.inf)  # false for NaN too
    wrong = (
        ops.total(ops.where(table[:, STEP] == table[0, STEP], 0.0, 1.0))
        + ops.total(ops.where(table[:, PURPOSE] == table[0, PURPOSE], 0.0, 1.0))
        + ops.total(ops.where(table[:, FINITE] == 1, 0.0, 1.0))
    )
    bad = (wrong + ops.total(ops.total(ops.where(valid, 0.0, 1.0)))) > 0
    differ = ops.total(ops.total(ops.where(rates == rates[0], 0.0, 1.0))) > 0
    steps = ops.total(table[:, STEPS])
    gamma = ops.total(rates) / ops.where(steps > 0, steps, 1.0)
    return Verdict(bad, differ, ops.total(table[:, SHARE]), gamma)


def complaint(ranks: Sequence[int], name: str) -> Callable[[Any], str]:
    """What is wrong in a table that `verdict` calls bad: the message, naming ranks, and what to do."""

    def describe(table: Any) -> str:
        if any(table[:, PURPOSE] != table[0, PURPOSE]):
            here = [f"rank {r} {PURPOSES[int(p)]}" for r, p in zip(ranks, table[:, PURPOSE], strict=True)]
            return (
                f"{name}: the workers are not in the same place: {', '.join(here)}. "
                "averaged_parameters() is a collective: call it on every rank, after the same step."
            )
        if any(table[:, STEP] != table[0, STEP]):
            steps = [f"rank {r} step {int(s)}" for r, s in zip(ranks, table[:, STEP], strict=True)]
            return (
                f"{name}: the workers are not at the same step: {', '.join(steps)}. "
                "Every rank must call step() equally often, and resume from checkpoints of one step."
            )
        rates = table[:, RATES:]
        for r, row in zip(ranks, rates, strict=True):
            for group, rate in enumerate(row):
                if not 0 <= rate < math.inf:
                    return (
                        f"{name}: a learning rate on rank {r} is not a finite number >= 0: the sum over the block in "
                        f"parameter group {group} is {rate}. Nothing was written; look at the scheduler there."
                    )
        broken = [f"rank {r}" for r, finite in zip(ranks, table[:, FINITE], strict=True) if finite != 1]
        return (
            f"{name}: parameters are not finite (NaN or infinity) on {', '.join(broken)} after step "
            f"{int(table[0, STEP])}. Nothing was exchanged or written, every worker still has its own parameters. "
            "A lower learning rate, gradient clipping or a loss scaler may help."
        )

    return describe


def oddity(ranks: Sequence[int], name: str) -> Callable[[Any], str]:
    """The warning about learning rates that differ between workers."""

    def describe(table: Any) -> str:
        means = table[:, RATES:] / table[:, STEPS : STEPS + 1]
        seen = [f"rank {r}: {', '.join(f'{g:.6g}' for g in row)}" for r, row in zip(ranks, means, strict=True)]
        return (
            f"{name}: the workers' learning rates differ (mean of the block; {'; '.join(seen)}). The outer step uses "
            "their mean on every worker. Usually this is a mistake: a scheduler driven by each worker's own loss."
        )

    return describe
