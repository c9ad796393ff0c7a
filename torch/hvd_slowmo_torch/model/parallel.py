"""Modules that PyTorch itself has spread over workers."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_SHARDED = {"FullyShardedDataParallel": "FSDP", "FSDPModule": "FSDP", "DTensor": "DTensor"}
"""Classes, by name: they lie in other modules in each version, and importing them costs a second."""


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which every worker has another part.

    Raises:
        ValueError: naming the first sharded module or parameter.

    Example:
        >>> refuse_sharded(nn.Linear(2, 1))
    """
    for name, part in [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]:
        for cls in type(part).__mro__:
            if cls.__name__ in _SHARDED and cls.__module__.startswith("torch.distributed"):
                raise ValueError(
                    f"{name or 'the model'} is sharded ({_SHARDED[cls.__name__]}): each worker has another part of its "
                    "values, and an average over workers would mix different parts. SlowMo needs a whole model on "
                    "every worker."
                )


def refuse_data_parallel(model: nn.Module, gradients: str, ranks: Sequence[int]) -> None:
    """Refuse a DistributedDataParallel that averages gradients over the workers among whom SlowMo averages parameters.

    One within each node is welcome: SlowMo then averages between nodes.

    Args:
        gradients: the setting of that name.
        ranks: of SlowMo's workers.

    Raises:
        ValueError: the gradients are averaged over all of them at every step, or a second time within the node.

    Example:
        >>> refuse_data_parallel(nn.Linear(2, 1), "local", (0, 1))
    """
    for module in model.modules():
        if not isinstance(module, DistributedDataParallel):
            continue
        if gradients != "local":
            raise ValueError(
                f"the model is a DistributedDataParallel, and gradients={gradients!r} averages its gradients a second "
                "time. Give SlowMo the module within it."
            )
        if len(ranks) > 1 and set(ranks) <= set(dist.get_process_group_ranks(module.process_group)):
            raise ValueError(
                "the model is a DistributedDataParallel over all workers: it averages gradients at every step, which "
                "SlowMo is there to save. Give SlowMo the module within it; or give DistributedDataParallel the "
                "process group of one node, so that SlowMo averages between nodes."
            )
