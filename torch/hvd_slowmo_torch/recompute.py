"""Recomputing BatchNorm's running statistics for the model as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.average.metric_mean import agree_on_success
from hvd_slowmo.core.start.arguments import refuse_both
from hvd_slowmo_torch.comm.workers import Transport, shared
from hvd_slowmo_torch.metric_mean import mean


def recompute_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: torch.device | None = None,
    process_set: Any = None,
    process_group: Any = None,
    transport: Transport | None = None,
    comm: Comm | None = None,
) -> None:
    """Set BatchNorm's running statistics to the mean over these batches, of all workers. A collective.

    Running statistics follow a model over many batches, and one that jumps by its slow momentum leaves them behind:
    the training loss is good and the evaluation's is not. Call this after `join()`, before an evaluation or a save that
    counts. A pass over 50 to 100 batches is enough; see Izmailov et al., UAI 2018 (arXiv 1803.05407), section 3.2.

    `num_batches_tracked` becomes the number of batches, as in torch.optim.swa_utils.update_bn; of several workers the
    mean. SyncBatchNorm layers take each worker's batches for themselves here, so their numbers may differ.

    Args:
        model: its BatchNorm layers are changed, and nothing else.
        batches: this worker's: inputs of the model, or tuples and lists that begin with them. None at all is allowed on
            a worker.
        device: to which inputs are moved.
        process_set, process_group, transport, comm: as given to `SlowMo`.

    Raises:
        ValueError: on every rank, if the workers' models have other BatchNorm layers.
        Exception: on every rank of one type, if the pass fails on one; all layers are as before then.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1, affine=False))
        >>> recompute_statistics(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[3.0], [5.0]])])
        >>> model[0].running_mean.item(), model[0].running_var.item()
        (3.0, 2.0)
    """
    refuse_both(comm, process_set=process_set, process_group=process_group, transport=transport)
    seen = 0

    def counted() -> Iterator[Any]:
        nonlocal seen
        for seen, batch in enumerate(batches, start=1):  # noqa: B007 - the last value is used after the loop
            yield batch

    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    statistics = {
        f"{name}.{kind}": tensor
        for name, layer in layers.items()
        for kind, tensor in (("mean", layer.running_mean), ("variance", layer.running_var))
        if tensor is not None
    }
    counts = [layer.num_batches_tracked for layer in layers.values() if layer.num_batches_tracked is not None]
    before = [(tensor, tensor.clone()) for tensor in (*statistics.values(), *counts)]
    error: Exception | None = None
    try:
        with _each_worker_alone(model), _settings_kept(model):
            torch.optim.swa_utils.update_bn(counted(), model, device)
    except Exception as caught:  # a worker that fails alone must not leave the others waiting
        error = caught
    workers = shared(process_set, process_group, transport) if comm is None else comm
    taken = 0.0  # the mean number of batches
    try:
        agree_on_success(workers, error)
        taken = mean(float(seen), comm=workers)
    finally:
        if not taken:  # a pass has failed, or nobody had a batch
            for tensor, former in before:
                tensor.copy_(former)
    if not taken:
        return
    means = mean(dict(statistics), weight=seen, comm=workers)
    for name, tensor in statistics.items():
        tensor.copy_(means[name])
    for count in counts:
        count.fill_(max(1, round(taken)))


@contextmanager
def _settings_kept(model: nn.Module) -> Iterator[None]:
    """Put back what update_bn changes for its pass, which it leaves behind if a batch fails."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(module, module.momentum) for module in model.modules() if isinstance(module, _BatchNorm)]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for layer, momentum in momenta:
            layer.momentum = momentum


@contextmanager
def _each_worker_alone(model: nn.Module) -> Iterator[None]:
    """Let SyncBatchNorm layers, PyTorch's and Horovod's, compute as BatchNorm does.

    They exchange in every forward pass, and workers with fewer batches would leave the others waiting.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and type(m).__name__ == "SyncBatchNorm"]
    for layer in layers:
        layer.forward = partial(_BatchNorm.forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
