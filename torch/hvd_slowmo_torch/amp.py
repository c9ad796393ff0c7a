"""The base optimizer's step under torch.amp.GradScaler.

A scaler that skipped the whole of SlowMo.step() after an overflow would leave one worker a step behind the others, and
later all of them in a deadlock (PyTorch issue 76282). So SlowMo declares that it handles scaling itself: the scaler
then always calls step(), with what it knows, and only the base optimizer's step is skipped.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.optim import Optimizer


def scaled_step(base: Optimizer, grad_scale: torch.Tensor | None, found_inf: Any) -> Any:
    """The base optimizer's step as the scaler would have made it.

    Args:
        base: the base optimizer.
        grad_scale: what the gradients are multiplied with; None if they are unscaled already.
        found_inf: greater than 0 if a gradient is not finite; a tensor, or 0 if there are no gradients.
    """
    if getattr(base, "_step_supports_amp_scaling", False):  # fused: reads both on the device, without waiting for them
        base.grad_scale, base.found_inf = grad_scale, found_inf  # type: ignore[attr-defined]
        try:
            return base.step()
        finally:
            del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
    if float(found_inf) > 0:
        return None
    if grad_scale is not None:
        _unscale(base, grad_scale)
    return base.step()


def _unscale(base: Optimizer, grad_scale: torch.Tensor) -> None:
    """Divide by the scale, with the scaler's own operation: the base optimizer sees the same bits as without SlowMo."""
    inverse = grad_scale.double().reciprocal().float()
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
    for group in base.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.dtype == torch.float16:
                raise ValueError("Attempting to unscale FP16 gradients. Keep the parameters in float32 under autocast.")
            values = p.grad._values() if p.grad.is_sparse else p.grad
            alike[values.device, values.dtype].append(values)
    for (device, _), gradients in alike.items():
        ignored = torch.zeros(1, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, ignored, inverse.to(device))
