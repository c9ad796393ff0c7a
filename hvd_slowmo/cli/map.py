"""The subcommand `map`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.cli.arguments import at_least, importing_from_here, model_named, parameter_map_named, refusals
from hvd_slowmo.cli.console import show
from hvd_slowmo.cli.table import table
from hvd_slowmo.errors import CommandError
from hvd_slowmo.interop.compare import Difference, compare
from hvd_slowmo.interop.copy import copy_to_keras
from hvd_slowmo.wire.parameter_map import pair
from hvd_slowmo.wire.tensors import TensorSpec


def add_map(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `map` to the command line."""
    parser = commands.add_parser(
        "map",
        help="show the map between a PyTorch and a Keras model, and compare the models",
        description="Makes a PyTorch model and its Keras version, prints the variable of each parameter and its "
        "orientation, copies PyTorch's values into the Keras model, runs one random batch through both and prints the "
        "largest difference of the outputs and, tensor by tensor, of one gradient. The exit status is 1 if they differ "
        "by more than rounding. Functions are looked up in the current directory too.",
    )
    parser.add_argument("torch", metavar="MODULE:FUNCTION", help="returns the PyTorch model; called without arguments")
    parser.add_argument("keras", metavar="MODULE:FUNCTION", help="returns the Keras model")
    parser.add_argument("--map", metavar="MODULE:NAME", help="a ParameterMap, or a function that returns one")
    parser.add_argument(
        "--input",
        action="append",
        metavar="SHAPE",
        help="shape of one sample as Keras takes it, like 28,28,1; by default the Keras model's. Once for each input",
    )
    parser.add_argument("--batch", type=at_least(1), default=4, metavar="N", help="samples in the batch, 4 by default")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the batch, 0 by default")
    parser.set_defaults(run=_map)


def _map(arguments: argparse.Namespace) -> int:
    with importing_from_here():
        return _show(arguments)


def _show(arguments: argparse.Namespace) -> int:
    # PyTorch first: the other way round its libraries may not load.
    from hvd_slowmo_torch.interop.layers import entries_torch

    # isort: split

    from hvd_slowmo_tf.interop.layers import entries_keras

    torch_model, keras_model = model_named(arguments.torch, "PyTorch"), model_named(arguments.keras, "Keras")
    parameter_map = parameter_map_named(arguments.map)
    with refusals():
        torch_specs, keras_specs = entries_torch(torch_model, parameter_map), entries_keras(keras_model, parameter_map)
        pairs = list(pair(torch_specs, keras_specs))
    show(_table(pairs))
    with refusals():
        copy_to_keras(torch_model, keras_model, parameter_map)
    inputs = _batch(keras_model, arguments)
    with refusals():
        output, gradients = compare(torch_model, torch_specs, keras_model, keras_specs, inputs)
    print(f"\nlargest difference of the outputs: {_spell(output)}")
    print("largest difference of a gradient, tensor by tensor:")
    width = max((len(gradient.name) for gradient in gradients), default=0)
    for gradient in gradients:
        show(f"  {gradient.name:{width}}  {_spell(gradient)}")
    return _show_verdict(output, gradients)


def _show_verdict(output: Difference, gradients: Sequence[Difference]) -> int:
    differing = [gradient for gradient in gradients if gradient.more_than_rounding]
    if not output.more_than_rounding and not differing:
        print("The models compute the same.")
        return 0
    if output.more_than_rounding:
        print("The outputs differ by more than rounding.")
    if differing:
        # Gradients flow backwards: the layers behind the last that differs agree.
        show(f"The gradients differ by more than rounding; the last to differ, in wire order: {differing[-1].name}.")
    return 1


def _table(pairs: Sequence[tuple[TensorSpec, TensorSpec]]) -> str:
    head = ("on the wire", "role", "shape", "PyTorch", "shape", "Keras", "shape", "orientation in Keras")
    rows = []
    for spec, keras_spec in pairs:
        part = "" if spec.view.whole else f" {spec.view.orientation}"
        wire = (spec.name, spec.role, _shape(spec.shape))
        torch_side = (spec.own + part, _shape(spec.view.own))
        rows.append((*wire, *torch_side, keras_spec.own, _shape(keras_spec.view.own), keras_spec.view.orientation))
    return table(head, rows)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _spell(difference: Difference) -> str:
    mark = "  <-- more than rounding" if difference.more_than_rounding else ""
    return f"{difference.largest:.3g} (largest value {difference.scale:.3g}){mark}"


def _batch(keras_model: Any, arguments: argparse.Namespace) -> list[NDArray[Any]]:
    """Return a random batch: normal values, or indices where a model takes those."""
    rng = np.random.default_rng(arguments.seed)
    inputs = list(getattr(keras_model, "inputs", None) or [])
    shapes = [tuple(tensor.shape)[1:] for tensor in inputs]
    if arguments.input:
        try:
            shapes = [tuple(at_least(1)(n) for n in text.split(",") if n) for text in arguments.input]
        except (ValueError, argparse.ArgumentTypeError):
            raise CommandError(f"--input must be like 28,28,1. Received: {' '.join(arguments.input)}") from None
    if not shapes or any(n is None for shape in shapes for n in shape):
        raise CommandError(f"the Keras model's input has no fixed shape ({shapes or 'none'}). Give it: --input 28,28,1")
    rows = _rows_of_embedding(keras_model)
    batch: list[NDArray[Any]] = []
    for number, shape in enumerate(shapes):
        dtype = str(inputs[number].dtype) if number < len(inputs) else str(keras_model.compute_dtype)
        if rows and (number == 0 or dtype.startswith("int")):
            batch.append(rng.integers(0, rows, (arguments.batch, *shape)))
        else:
            batch.append(rng.standard_normal((arguments.batch, *shape)).astype(dtype))
    return batch


def _rows_of_embedding(keras_model: Any) -> int:
    """Return the rows of the smallest embedding if the model begins with one, otherwise 0."""
    import keras

    layers = [layer for layer in keras_model._flatten_layers() if layer.weights and not layer._layers]
    embeddings = [layer.input_dim for layer in layers if isinstance(layer, keras.layers.Embedding)]
    return min(embeddings) if embeddings and isinstance(layers[0], keras.layers.Embedding) else 0
