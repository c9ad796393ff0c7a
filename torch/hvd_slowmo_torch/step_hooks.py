"""The wrapper that torch.optim puts around every step(), at its price only where somebody looks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

T = TypeVar("T", bound=Callable[..., Any])

_is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling
"""The latter before PyTorch 2.2."""


def hooked_at_need(step: T) -> T:
    """Decorate a step() of an optimizer so that hooks and the profiler see it as they see those of torch.optim.

    PyTorch's own wrapper makes a record for the profiler in every step, which takes longer than all else in a step of
    SlowMo without an exchange. So it is there under a profiler, or with hooks on this optimizer or on all of them.
    Under torch.compile the step is a graph break, as in the optimizers of torch.optim.
    """
    hooked = Optimizer.profile_hook_step(torch._disable_dynamo(step))  # type: ignore[attr-defined]

    @functools.wraps(step)
    def either(*args: Any, **kwargs: Any) -> Any:
        optimizer: Optimizer = args[0]
        if _is_compiling() or (
            (
                profiler._is_profiler_enabled
                or optimizer._optimizer_step_pre_hooks
                or optimizer._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
            )
            and type(optimizer).step is either  # PyTorch has wrapped the step of a subclass
        ):
            return hooked(*args, **kwargs)
        return step(*args, **kwargs)

    either.hooked = True  # type: ignore[attr-defined]  # PyTorch does not wrap it once more then
    return either  # type: ignore[return-value]
