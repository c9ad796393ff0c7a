"""The SlowMo optimizers that train a model under `fit`, and each one's part of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from hvd_slowmo_tf.optimizer import SlowMo


class ModelPart(NamedTuple):
    """One optimizer's part of a model that several optimizers train."""

    variables: list[keras.Variable]  # that it brings to a common start
    statistics: list[keras.Variable]  # among them, those that it averages beside the variables that it trains


def find_optimizers(model: keras.Model, given: Sequence[SlowMo] = ()) -> list[SlowMo]:
    """Return the optimizers to keep together: those given or, without any, all among the model's attributes.

    Args:
        model: compiled.
        given: to `SlowMoCallback`.

    Raises:
        TypeError: the model has none.
        ValueError: several, with a parameter_map.

    Example:
        >>> from hvd_slowmo.tf import SlowMoConfig
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile(SlowMo(keras.optimizers.SGD(0.1), SlowMoConfig()), "mse")
        >>> [optimizer.name for optimizer in find_optimizers(model)]
        ['slowmo']
    """
    found = list(given) or [x for x in _optimizers_among(model) if isinstance(x, SlowMo)]
    if not found:
        received = type(getattr(model, "optimizer", None)).__name__
        raise TypeError(
            f"SlowMoCallback needs a model compiled with SlowMo. Its optimizer is: {received}. Where a train_step of "
            "the model uses others, make them its attributes or give them: SlowMoCallback(optimizer, ...)"
        )
    if len(found) > 1 and any(optimizer.worker.parameter_map is not None for optimizer in found):
        raise ValueError(
            f"{model.name} has {len(found)} SlowMo optimizers, and a parameter_map shows all of a model to one. Train "
            "with one optimizer, or without the map."
        )
    return found


def other_optimizers(model: keras.Model) -> list[str]:
    """Return names of the model's attributes that train variables with an optimizer other than SlowMo."""
    return [
        f"{x.name} ({type(x).__name__})"
        for x in _optimizers_among(model)
        if not isinstance(x, SlowMo) and getattr(x, "_trainable_variables", None)
    ]


def build_from_batch(model: keras.Model, optimizers: Sequence[SlowMo], batch: Any) -> None:
    """Make the variables of a model and of its optimizers. Nothing trains and nothing communicates.

    A custom train_step alone knows how the layers are called and which optimizer trains which variables. It is traced
    once, in which the optimizers' `apply` only builds them.

    Args:
        model: compiled.
        optimizers: of the model.
        batch: tf.TensorSpec in the structure of a batch.
    """
    if len(optimizers) == 1 and type(model).train_step is keras.Model.train_step:
        model._symbolic_build(data_batch=batch)
        return
    for optimizer in optimizers:
        optimizer.worker.only_builds = True
    try:
        step = model._autoconvert_optionals(model.train_step)
        tf.function(step, autograph=False).get_concrete_function(batch)
    finally:
        for optimizer in optimizers:
            optimizer.worker.only_builds = False


def split_model(model: keras.Model, optimizers: Sequence[SlowMo]) -> list[ModelPart]:
    """Return each optimizer's part of the model. No variable is in two parts.

    - A statistic goes to the optimizer that trains the variables of its layer or, if the layer has none, of the
      smallest layer around it. The first optimizer has those of layers that several optimizers train.
    - The rest (frozen and untrained variables, counters) is brought to a common start with the first optimizer's part
      and stays each worker's own afterwards.

    Args:
        model: with variables.
        optimizers: built.

    Raises:
        ValueError: an optimizer is not built, or two train the same variable.

    Example:
        >>> from hvd_slowmo.tf import SlowMoConfig
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
        >>> first, second = (SlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(), name=name) for name in "ab")
        >>> first.build(model.layers[0].trainable_variables)
        >>> second.build(model.layers[1].trainable_variables)
        >>> [[v.name for v in part.variables] for part in split_model(model, [first, second])]
        [['kernel', 'bias'], ['kernel', 'bias']]
    """
    trained_by: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        if not optimizer.built:
            raise ValueError(
                f"{optimizer.name} has no variables: the first step of {model.name} trains none with it. Build it "
                "before fit(): optimizer.build(variables)."
            )
        for v in optimizer._trainable_variables:
            other = trained_by.setdefault(id(v), number)
            if other != number:
                raise ValueError(
                    f"{v.path} is trained by both {optimizers[other].name} and {optimizer.name}, which would average "
                    "it twice. Train it with one of them."
                )
    statistics = dict(_statistics(model, trained_by, 0))
    parts = [ModelPart(list(optimizer._trainable_variables), []) for optimizer in optimizers]
    metrics = {id(v) for metric in model.metrics for v in metric.variables}
    for v in model.variables:
        if id(v) in trained_by or id(v) in metrics:
            continue
        part = parts[statistics.get(id(v), 0)]
        part.variables.append(v)
        if id(v) in statistics:
            part.statistics.append(v)
    return parts


def _statistics(layer: keras.Layer, trained_by: dict[int, int], around: int) -> Iterator[tuple[int, int]]:
    """Yield the ids of a layer's statistics with the number of the optimizer that averages them."""
    owners = {trained_by[id(v)] for v in layer.trainable_variables if id(v) in trained_by}
    owner = owners.pop() if len(owners) == 1 else around
    if layer.trainable:  # a frozen layer's stay as they are
        yield from ((id(v), owner) for v in layer._non_trainable_variables)
    for inner in layer._layers:
        yield from _statistics(inner, trained_by, owner)


def _optimizers_among(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """Return the optimizers among a model's attributes, and in its lists and dicts, each once."""
    values: list[Any] = []
    for value in vars(model).values():
        if isinstance(value, dict):
            values.extend(value.values())
        else:
            values.extend(value if isinstance(value, (list, tuple)) else [value])
    return list({id(x): x for x in values if isinstance(x, keras.optimizers.Optimizer)}.values())
