"""The workers' mean of losses and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.average.metric_mean import mean_of
from hvd_slowmo.core.start.arguments import refuse_both
from hvd_slowmo_torch.comm.workers import Transport, shared

V = TypeVar("V", float, torch.Tensor)


@overload
def mean(
    value: V,
    weight: float = 1.0,
    *,
    process_set: Any = None,
    process_group: Any = None,
    transport: Transport | None = None,
    comm: Comm | None = None,
) -> V: ...
@overload
def mean(
    value: Mapping[str, V],
    weight: float = 1.0,
    *,
    process_set: Any = None,
    process_group: Any = None,
    transport: Transport | None = None,
    comm: Comm | None = None,
) -> dict[str, V]: ...
def mean(
    value: Any,
    weight: float = 1.0,
    *,
    process_set: Any = None,
    process_group: Any = None,
    transport: Transport | None = None,
    comm: Comm | None = None,
) -> Any:
    """Return the weighted mean of a loss or metric over the workers. A collective.

    Use it at the end of an epoch. In every step it would make the workers wait for each other, which SlowMo avoids.

    Args:
        value: a number, a tensor, or a dict of them; small, because every worker receives all workers' values. A tensor
            keeps its shape, type and device; the mean of integers has the default type.
        weight: of this worker, such as its number of samples. Workers of weight 0 take no part, whatever their values
            are; if all weights are 0 the mean is NaN.
        process_set: the Horovod process set whose workers are meant; None for all ranks.
        process_group: the same of torch.distributed.
        transport: "horovod" or "torch" where both are initialized.
        comm: the workers, in place of these.

    Returns:
        The mean in the form of `value`.

    Raises:
        TypeError, ValueError: on every rank, if one's value or weight is no number, or names or shapes differ.

    Example:
        >>> mean(0.5)
        0.5
        >>> mean({"loss": torch.tensor([0.5, 1.5])}, weight=64)
        {'loss': tensor([0.5000, 1.5000])}
    """
    refuse_both(comm, process_set=process_set, process_group=process_group, transport=transport)
    workers = shared(process_set, process_group, transport) if comm is None else comm
    return mean_of(workers, value, weight, _to_numpy, _like)


def _to_numpy(value: Any) -> Any:
    # Through float64, because NumPy has no bfloat16.
    return value.detach().to("cpu", torch.float64).numpy() if isinstance(value, torch.Tensor) else value


def _like(value: Any, mean: NDArray[np.float64]) -> Any:
    if isinstance(value, torch.Tensor):
        dtype = value.dtype if value.dtype.is_floating_point else torch.get_default_dtype()
        return torch.as_tensor(mean, dtype=dtype, device=value.device)
    return mean if mean.shape else float(mean)
