"""Replicas of a model: stacked parameters and buffers, and the gradients of all replicas by one vectorized backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad_and_value
from torch.optim import Optimizer

from hvd_slowmo.core.parts.layout import ParameterGroups, lay_out
from hvd_slowmo.core.parts.slices import travels_in_slices
from hvd_slowmo_torch.checks import check_inner_optimizer, check_types
from hvd_slowmo_torch.inner import inner_optimizer as inner_state
from hvd_slowmo_torch.model.layout import TensorRef, TorchLayout, groups_of, refs_of, state_refs
from hvd_slowmo_torch.worker import Settings

Inner = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an inner optimizer over parameters."""
Loss = Callable[[Any, Any], torch.Tensor]
"""Returns the loss, a scalar, of a model's output for a batch and its targets."""

_NORMS = ("LARS", "LAMB", "Lamb", "LBFGS", "Muon", "Adafactor", "Shampoo", "DistributedShampoo", "SOAP", "GaLoreAdamW")


class Replicas:
    """m replicas of a model, each trained tensor stacked as (m, *shape).

    Args:
        model: with the values from which all replicas start; it is copied.
        inner: makes the inner optimizer; called with the stacked parameters, and once with one model's.
        workers: m.
        settings: of the simulation.

    Attributes:
        template: a copy of the model, for its forward pass.
        stacked: the trained parameters and the buffers by name, in the model's order.
        inner: the inner optimizer over the stacked parameters.

    Raises:
        TypeError, ValueError: a model or an optimizer that can't be stacked.
    """

    def __init__(self, model: nn.Module, inner: Inner, workers: int, settings: Settings) -> None:
        self.template = copy.deepcopy(model)
        trained = {name: p for name, p in self.template.named_parameters() if p.requires_grad}
        one = inner(list(trained.values()))
        check_types(one, self.template, settings)
        check_inner_optimizer(one, settings.config)
        _refuse_norms(one)
        self._workers, self._settings, self._one = workers, settings, one
        self._parameters = {name: nn.Parameter(_stack(p, workers)) for name, p in trained.items()}
        self._buffers = {name: _stack(buffer, workers) for name, buffer in self.template.named_buffers()}
        self.stacked: dict[str, torch.Tensor] = {**self._parameters, **self._buffers}
        self.inner = inner(list(self._parameters.values()))
        self._by_function: bool | None = None  # the order in which gradients are taken; None before the first step

    def backward(self, loss: Loss, x: Any, y: Any) -> torch.Tensor:
        """Set the gradients of each replica's loss for its own batch; BatchNorm's statistics follow, per replica.

        As after `zero_grad` and `backward`, a parameter that the loss does not depend on has none.

        Args:
            x, y: tensors, or nested structures of them, with a leading axis of the replicas.

        Returns:
            The losses (m,).

        Raises:
            ValueError: the loss is no scalar, or depends on no parameter.
        """
        for parameter in self._parameters.values():  # their memory is free for this step's
            parameter.grad = None
        if self._by_function is None:
            buffers, state = [buffer.clone() for buffer in self._buffers.values()], torch.get_rng_state()
            try:
                losses = self._gradients_by_function(loss, x, y)
            except RuntimeError:  # torch.func has no rule for it, such as LayerNorm under autocast
                for buffer, before in zip(self._buffers.values(), buffers, strict=True):
                    buffer.copy_(before)
                torch.set_rng_state(state)
                losses = self._gradients_by_backward(loss, x, y)
                self._by_function = False
            else:
                self._by_function = True
            return losses
        of_all = self._gradients_by_function if self._by_function else self._gradients_by_backward
        return of_all(loss, x, y)

    def _gradients_by_function(self, loss: Loss, x: Any, y: Any) -> torch.Tensor:
        """Vectorize the gradient. In the other order gradients come transposed, and PyTorch copies them."""
        used: set[str] = set()

        def of_one(parameters: dict[str, torch.Tensor], buffers: Any, x: Any, y: Any) -> torch.Tensor:
            for name, parameter in parameters.items():  # torch.func gives zeros to those that are not used
                parameter.register_hook(lambda _, name=name: used.add(name))  # type: ignore[no-untyped-call]
            return self._loss_of(loss, parameters, buffers, x, y)

        of_all = torch.vmap(grad_and_value(of_one), randomness="different")
        values = {name: p.detach() for name, p in self._parameters.items()}
        gradients, losses = of_all(values, self._buffers, x, y)
        if not used:
            raise ValueError("the loss depends on no parameter that is trained. Was its input detached?")
        memory: set[int] = set()
        for name, parameter in self._parameters.items():
            parameter.grad = _own(gradients[name], memory) if name in used else None
        found: torch.Tensor = losses.detach()
        return found

    def _gradients_by_backward(self, loss: Loss, x: Any, y: Any) -> torch.Tensor:
        """Take the gradient of the vectorized losses."""
        of_all = torch.vmap(partial(self._loss_of, loss), randomness="different")
        losses: torch.Tensor = of_all(self._parameters, self._buffers, x, y)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def _loss_of(self, loss: Loss, parameters: Any, buffers: Any, x: Any, y: Any) -> torch.Tensor:
        """Return the loss of one replica."""
        found = loss(functional_call(self.template, (parameters, buffers), (x,)), y)
        if found.numel() != 1:
            raise ValueError(f"a loss must be one number for a worker's batch. Received: shape {tuple(found.shape)}")
        return found.reshape(())

    def model(self, worker: int) -> nn.Module:
        """Return a copy of one replica, in evaluation mode."""
        found = copy.deepcopy(self.template).eval()
        tensors = {**dict(found.named_parameters()), **dict(found.named_buffers())}
        with torch.no_grad():
            for name, stack in self.stacked.items():
                tensors[name].copy_(stack[worker])
        return found

    def describe(self) -> tuple[TorchLayout, ParameterGroups]:
        """Return the layout of one worker's messages, whose refs find stacked tensors, and the parameter groups.

        Raises:
            ValueError: the model has spectral normalization.
        """
        config, one = self._settings.config, self._one
        refs = refs_of(self.template, one, None)
        if any(ref.unit is not None for ref in refs):
            raise ValueError("spectral normalization can't be simulated: its vectors have a norm of each replica's.")
        groups = groups_of(refs, self.template, one)
        stacked = [self._found(ref.spec.own, ref) for ref in refs]
        if config.inner_state == "average" and config.tau is not None:
            stacked += self._state_refs()
        sliced = partial(travels_in_slices, config)
        return lay_out(stacked, groups, self._settings.chunk_bytes, config.fragments, sliced), groups

    def _found(self, name: str, ref: TensorRef) -> TensorRef:
        stack = self.stacked[name]
        return TensorRef(ref.spec, ref.device, lambda: stack, ref.watched)

    def _state_refs(self) -> list[TensorRef]:
        """Return the inner optimizer's state tensors; a step count is common, as it has not the parameter's form."""
        names = {id(p): name for name, p in self.template.named_parameters()}
        averaged = inner_state.averaged(self._one)
        pairs = [(key, names[id(p)], p, like) for key, found in averaged.items() for p, like in found]
        result = []
        for (key, name, p, like), ref in zip(pairs, state_refs(self.template, self._one), strict=True):
            stack = self.stacked[name]
            shape = stack.shape if like.shape == p.shape else like.shape
            find = partial(inner_state.state_tensor, self.inner, stack, key, (shape, like.dtype, like.device))
            result.append(TensorRef(ref.spec, ref.device, find))
        return result


def _stack(tensor: torch.Tensor, workers: int) -> torch.Tensor:
    return torch.stack([tensor.detach()] * workers)


def _own(gradient: torch.Tensor, memory: set[int]) -> torch.Tensor:
    """Return a gradient that can be written to: the ones of a sum's terms are one tensor, and a mean's is expanded."""
    own = gradient.contiguous()
    if own.untyped_storage().data_ptr() in memory:
        own = own.clone()
    memory.add(own.untyped_storage().data_ptr())
    return own


def _refuse_norms(inner: Optimizer) -> None:
    """Refuse optimizers that are known to look at a whole parameter at once: that would be all replicas."""
    name = type(inner).__name__
    if name in _NORMS:
        raise ValueError(
            f"{name} takes norms or products of a whole parameter, which would mix the replicas of a stack. Use an "
            "elementwise optimizer, such as SGD, Adam or AdamW."
        )
