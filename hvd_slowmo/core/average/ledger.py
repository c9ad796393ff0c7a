"""The ledger: a table with a row per worker, by which all workers decide alike when they meet.

It travels as one small float64 vector, started together with the first chunk and read before anything is written. Each
worker fills its own row and leaves zeros elsewhere, so the sum is the table. A NaN stays in its row, since 0 + NaN only
occurs there. Everyone decides with the table, never with its own numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from numpy.typing import NDArray

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.layout import Layout
from hvd_slowmo.core.parts.ops import Ops
from hvd_slowmo.core.parts.progress import Progress, Scalar, Vector

TRAINING, AVERAGE = 0, 1  # the reasons for a meeting: an outer step or a join; averaged_parameters()


class Row(NamedTuple):
    """One worker's row; the sums of its learning rates, one per parameter group, stand behind it.

    With several fragments its `clocks` follow. `columns` reads a whole table in these names.
    """

    meeting_step: Scalar  # the step at which it meets the others
    reason: Scalar  # TRAINING or AVERAGE
    training: Scalar  # 1 while it trains, 0 in a join
    leaving: Scalar  # 1: it joins for the last time
    finite: Scalar  # 1: what it sends is finite
    weight: Scalar  # its weight in the mean: own inner steps since the last average / tau
    counted: Scalar  # its weight in plain means: 1, or 0 if it is excluded
    steps: Scalar  # inner steps that it has completed
    rate_steps: Scalar  # inner steps that its sums of learning rates cover
    misfit: Scalar  # see `Condition`
    entered: Scalar  # see `Condition`
    drift: Scalar  # its squared distance from the mean at the outer step before, where that is measured
    ending: Scalar = 0.0  # 1: it has been asked to end, see `hvd_slowmo.core.parts.roll_call`
    regroups: Scalar = 0.0  # 1: it has heard of workers that come or go, see `hvd_slowmo.core.parts.runtime.Regrouping`


RATES = len(Row._fields)
"""The column at which the sums of learning rates begin."""
_SAME_RATE = 1e-6  # relative; sums of equal rates may differ by rounding between frameworks


def clocks(ops: Ops, progress: Progress) -> Vector:
    """Return the clocks of all fragments as one vector: a join looks at all of them. Empty for a single fragment."""
    if progress.since.shape[0] == 1:
        return ops.vector([])
    return ops.unpack(ops.pack([progress.since, progress.rate_steps, ops.reshape(progress.rate_sums, (-1,))]))


def row_length(layout: Layout) -> int:
    """Return the length of a worker's row, rates and clocks included."""
    several = layout.fragments > 1
    return RATES + layout.group_count + several * layout.fragments * (2 + layout.group_count)


class Clocks(NamedTuple):
    """The fields of `Progress` in one worker's clocks."""

    since: Vector
    rate_steps: Vector
    rate_sums: Vector


def clocks_of(ops: Ops, row: Vector, fragments: int, groups: int) -> Clocks:
    """Return the clocks in a row of the table, which stand behind the rates."""
    if fragments == 1:
        named = Row(*(row[number] for number in range(RATES)))
        one = ops.vector([named.rate_steps])
        return Clocks(one * 0, one, ops.reshape(row[RATES : RATES + groups], (1, groups)))
    behind = row[RATES + groups :]
    sums = ops.reshape(behind[2 * fragments :], (fragments, groups))
    return Clocks(behind[:fragments], behind[fragments : 2 * fragments], sums)


class Verdict(NamedTuple):
    """The conclusion from a ledger, equal on every worker."""

    failed: Scalar  # bool: nothing may be written, see `error_text`
    rates_differ: Scalar  # bool: worth a warning, see `rates_warning`
    training: Scalar  # number of workers that train
    weight: Scalar  # sum of the workers' weights
    counted: Scalar  # sum of their weights in plain means
    entered: Scalar  # bool: values have come from outside on one of them, see `entry_warning`
    gamma: Vector  # mean learning rate of the block per parameter group: sum of sums / sum of steps
    regroups: Scalar = False  # bool: one of them has heard of workers that come or go


def columns(table: Any) -> Row:
    """Return the columns of a table of shape (workers, 14 + groups), NumPy's or traced, by the names of `Row`."""
    return Row(*(table[:, number] for number in range(RATES)))


def own_row(ops: Ops, rank: int, size: int, row: Sequence[Scalar], rates: Vector, *behind: Vector) -> list[Any]:
    """Return a worker's contribution to a table, its own row between zeros, as parts for `Ops.pack`."""
    width = len(row) + sum(part.shape[0] for part in (rates, *behind))
    before, after = ops.vector([0.0] * rank * width), ops.vector([0.0] * (size - 1 - rank) * width)
    return [before, *row, rates, *behind, after]


def verdict(ops: Ops, table: Any, nonfinite: str) -> Verdict:
    """Judge a table of shape (workers, 14 + groups).

    Args:
        nonfinite: the setting of that name.
    """
    return ops.shared(f"verdict, {nonfinite}", partial(_judge, ops, nonfinite), table)


def all_average(ops: Ops, table: Any) -> bool:
    """Return whether all workers have come for an average of all; not in a trace."""
    return not ops.sum(ops.where(columns(table).reason == AVERAGE, 0.0, 1.0))


def _judge(ops: Ops, nonfinite: str, table: Any) -> Verdict:
    column, rates = Row(*ops.columns(table)[:RATES]), table[:, RATES:]
    workers, training, weight = table.shape[0], ops.sum(column.training), ops.sum(column.weight)
    valid = (rates >= 0) & (rates < math.inf)  # false for NaN too
    wrong = (
        ops.sum(ops.where(column.meeting_step == column.meeting_step[0], 0.0, 1.0))
        + ops.sum(ops.where(column.reason == column.reason[0], 0.0, 1.0))
        + ops.sum(ops.sum(ops.where(valid, 0.0, 1.0)))
    )
    wrong = wrong + ops.sum(ops.where(column.misfit == 0, 0.0, 1.0))
    finite = ops.sum(column.finite)
    # Workers without finite values are excluded; at least one with a weight must remain.
    enough = (finite > 0) & ((training == 0) | (weight > 0)) if nonfinite == "exclude" else finite == workers
    failed = (wrong > 0) | (ops.where(enough, 0.0, 1.0) > 0)
    rates = ops.where(valid, rates, 0.0)
    usual = ops.sum(rates * column.training[:, None]) / ops.where(training > 0, training, 1.0)
    apart = (rates - usual) * (rates - usual) > (_SAME_RATE * usual) * (_SAME_RATE * usual)
    differ = ops.sum(ops.sum(ops.where(apart, 1.0, 0.0) * column.training[:, None])) > 0
    steps = ops.sum(column.rate_steps)
    gamma = ops.sum(rates) / ops.where(steps > 0, steps, 1.0)
    entered = ops.sum(column.entered) > 0
    regroups = ops.sum(column.regroups) > 0
    return Verdict(failed, differ, training, weight, ops.sum(column.counted), entered, gamma, regroups)


Words = Callable[[NDArray[Any]], str]
"""Puts a table into words."""


def misfit_text(name: str, rank: int, which: str, mixes: bool = False) -> str:
    """Return the error for a model of another form.

    Args:
        which: names the tensor and its change.
        mixes: the worker may have taken part in gossip since.
    """
    sent = (
        "Others may have mixed zeros in place of its parameters since then: go on from a checkpoint"
        if mixes
        else "Nothing was sent or written"
    )
    return (
        f"{name}: the model on rank {rank} is not the one that the optimizer was constructed with: {which}. "
        f"{sent}. Change shapes, types, masks and buffers before SlowMo is constructed, or construct another SlowMo "
        "for the changed model."
    )


def error_text(
    ranks: Sequence[int], name: str, tensors: Sequence[str] = (), new: str = "", mixes: bool = False
) -> Words:
    """Return the error for a table with a failed verdict: it names the ranks at fault, and says what to do.

    Args:
        tensors: names of all tensors, in the order of the layout.
        new: name of a buffer that this worker's model has in addition.
        mixes: workers gossip between two meetings.
    """

    def describe(table: NDArray[Any]) -> str:
        column = columns(table)
        for r, misfit in zip(ranks, column.misfit, strict=True):
            if misfit:
                changed = f"{tensors[int(misfit) - 1]} has another form"
                which = changed if misfit > 0 else f"there is a new buffer {new}".rstrip()
                return misfit_text(name, r, which, mixes and misfit > 0)
        if any(column.reason != column.reason[0]):
            places = [f"rank {r} is {_place(Row(*row[:RATES]))}" for r, row in zip(ranks, table, strict=True)]
            return (
                f"{name}: the workers are not in the same place: {', '.join(places)}. "
                "averaged_parameters() is a collective: call it on every rank, after the same step."
            )
        if any(column.meeting_step != column.meeting_step[0]):
            steps = [f"rank {r} step {int(s)}" for r, s in zip(ranks, column.meeting_step, strict=True)]
            return (
                f"{name}: the workers are not at the same step: {', '.join(steps)}. Call step() equally often on "
                "every rank or join() after uneven data. After a resume: load the state on every rank, of one step."
            )
        for r, rates in zip(ranks, table[:, RATES:], strict=True):
            for group, rate in enumerate(rates):
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


def _not_finite(ranks: Sequence[int], name: str, table: NDArray[Any]) -> str:
    column = columns(table)
    broken = [f"rank {r}" for r, finite in zip(ranks, column.finite, strict=True) if finite != 1]
    return (
        f"{name}: parameters, BatchNorm statistics or averaged inner state are not finite (NaN or infinity) on "
        f"{', '.join(broken)} after step {int(column.meeting_step[0])}"
    )


def _place(row: Row) -> str:
    if row.reason == AVERAGE:
        return "in averaged_parameters()"
    return "at an outer step" if row.training else "in join()"


def rates_warning(ranks: Sequence[int], name: str) -> Words:
    """Return the warning about learning rates that differ between workers that train."""

    def describe(table: NDArray[Any]) -> str:
        rows = [(r, Row(*row[:RATES]), row[RATES:]) for r, row in zip(ranks, table, strict=True)]
        means = [(r, sums / row.rate_steps) for r, row, sums in rows if row.training]
        seen = [f"rank {r}: {', '.join(f'{rate:.6g}' for rate in rates)}" for r, rates in means]
        return (
            f"{name}: the workers' learning rates differ (mean of the block; {'; '.join(seen)}). The outer step uses "
            "their mean on every worker. Usually this is a mistake: a scheduler driven by each worker's own loss."
        )

    return describe


def entry_warning(ranks: Sequence[int], name: str, config: SlowMoConfig) -> Words:
    """Return the warning about values that no step has made."""
    if not config.vectors:
        mixes = config.gossip is not None and config.tau is None
        effect = "They are mixed with the other workers' like any others" if mixes else "All workers take the mean"
    else:
        anchor = "the workers' mean becomes" if config.average else "on every worker its own parameters become"
        effect = f"They are not counted as progress: {anchor} the new anchor"
        effect += ", and slow momentum begins anew" if "v" in config.vectors else ""

    def describe(table: NDArray[Any]) -> str:
        column = columns(table)
        where = [f"rank {r}" for r, entered in zip(ranks, column.entered, strict=True) if entered]
        return entry_text(name, where, effect)

    return describe


def entry_text(name: str, where: Sequence[str], effect: str) -> str:
    """Return the warning about values that no step has made.

    Args:
        where: the ranks, in words.
        effect: the fate of the values, in words.
    """
    return (
        f"{name}: parameters were given other values from outside on {', '.join(where)} (loaded weights, say). "
        f"{effect}. To begin from rank 0's values, call optimizer.restart() on every rank after loading."
    )


def exclusion_warning(ranks: Sequence[int], name: str) -> Words:
    """Return the warning about workers that are excluded from an average."""

    def describe(table: NDArray[Any]) -> str:
        broken = _not_finite(ranks, name, table)
        return f"{broken}; left out of the average (nonfinite='exclude'), gets the others' result."

    return describe
