"""The subcommand `map`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hvd_slowmo.cli.arguments import Wrong, given_map, looking_here, made
from hvd_slowmo.cli.table import table

if TYPE_CHECKING:
    from hvd_slowmo.interop.compare import Difference
    from hvd_slowmo.wire.tensors import TensorSpec


def add_map(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `map` to the command line."""
    parser = commands.add_parser(
        "map",
        help="show which PyTorch parameter is which Keras variable, and whether both models compute the same",
        description="Makes a PyTorch model and its Keras version, prints which parameter is which variable and "
        "in which orientation, copies PyTorch's values into the Keras model, runs one random batch through both and "
        "prints the largest difference of the outputs and, tensor by tensor, of one gradient. Exit status 1 if "
        "they differ by more than rounding. Functions are looked up in the current directory too.",
    )
    parser.add_argument("torch", metavar="MODULE:FUNCTION", help="gives the PyTorch model; called without arguments")
    parser.add_argument("keras", metavar="MODULE:FUNCTION", help="gives the Keras model")
    parser.add_argument("--map", metavar="MODULE:NAME", help="a ParameterMap, or a function that gives one")
    parser.add_argument(
        "--input",
        action="append",
        metavar="SHAPE",
        help="shape of one sample as Keras takes it, like 28,28,1; by default the Keras model's. Once for each input",
    )
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="samples in the batch, 4 by default")
    parser.add_argument("--seed", type=int, default=0, help="of the batch, 0 by default")
    parser.set_defaults(run=_map)


def _map(arguments: argparse.Namespace) -> int:
    try:
        with looking_here():
            return _show(arguments)
    except (Wrong, ImportError, ValueError, TypeError) as error:
        print(f"hvd-slowmo map: {error}", file=sys.stderr)
        return 1


def _show(arguments: argparse.Namespace) -> int:
    # PyTorch first: the other way round its libraries may not load.
    from hvd_slowmo_torch.interop.layers import entries_torch

    # isort: split
    from hvd_slowmo.interop.compare import compare
    from hvd_slowmo.interop.copy import copy_to_keras
    from hvd_slowmo.wire.parameter_map import pair
    from hvd_slowmo_tf.interop.layers import entries_keras

    torch_model, keras_model = made(arguments.torch), made(arguments.keras)
    parameter_map = given_map(arguments.map)
    ours, theirs = entries_torch(torch_model, parameter_map), entries_keras(keras_model, parameter_map)
    pairs = list(pair(ours, theirs))
    print(_table(pairs))
    copy_to_keras(torch_model, keras_model, parameter_map)
    inputs = _batch(keras_model, arguments)
    output, gradients = compare(torch_model, ours, keras_model, theirs, inputs)
    print(f"\nlargest difference of the outputs: {_spell(output)}")
    print("largest difference of a gradient, tensor by tensor:")
    width = max((len(each.name) for each in gradients), default=0)
    for each in gradients:
        print(f"  {each.name:{width}}  {_spell(each)}")
    return _verdict(output, gradients)


def _verdict(output: Difference, gradients: Sequence[Difference]) -> int:
    apart = [each for each in gradients if each.more_than_rounding]
    if not output.more_than_rounding and not apart:
        print("The models compute the same.")
        return 0
    if output.more_than_rounding:
        print("The outputs differ by more than rounding.")
    if apart:
        # Gradients flow backwards: the layers behind the last that differs agree.
        print(f"The gradients differ by more than rounding; the last to differ, in wire order: {apart[-1].name}.")
    return 1


def _table(pairs: Sequence[tuple[TensorSpec, TensorSpec]]) -> str:
    head = ("on the wire", "rule", "shape", "PyTorch", "shape", "Keras", "shape", "orientation in Keras")
    rows = []
    for ours, theirs in pairs:
        place = "" if ours.view.whole else f" {ours.view.orientation}"
        own = (ours.own + place, _shape(ours.view.own), theirs.own, _shape(theirs.view.own), theirs.view.orientation)
        rows.append((ours.name, ours.rule, _shape(ours.shape), *own))
    return table(head, rows)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _spell(difference: Difference) -> str:
    apart = "  <-- more than rounding" if difference.more_than_rounding else ""
    return f"{difference.largest:.3g} (largest value {difference.scale:.3g}){apart}"


def _batch(keras_model: Any, arguments: argparse.Namespace) -> list[Any]:
    """A random batch: normal values, or indices where a model takes those."""
    import numpy as np

    rng = np.random.default_rng(arguments.seed)
    known = list(keras_model.inputs or []) if getattr(keras_model, "inputs", None) else []
    shapes = [tuple(tensor.shape)[1:] for tensor in known]
    if arguments.input:
        try:
            shapes = [tuple(int(n) for n in text.split(",") if n) for text in arguments.input]
        except ValueError:
            raise Wrong(f"--input must be like 28,28,1. Received: {' '.join(arguments.input)}") from None
    if not shapes or any(n is None for shape in shapes for n in shape):
        raise Wrong(f"the Keras model's input has no fixed shape ({shapes or 'none'}). Give it: --input 28,28,1")
    rows = _indices(keras_model)
    batch = []
    for number, shape in enumerate(shapes):
        dtype = str(known[number].dtype) if number < len(known) else str(keras_model.compute_dtype)
        if rows and (number == 0 or dtype.startswith("int")):
            batch.append(rng.integers(0, rows, (arguments.batch, *shape)))
        else:
            batch.append(rng.standard_normal((arguments.batch, *shape)).astype(dtype))
    return batch


def _indices(keras_model: Any) -> int:
    """Rows of the smallest embedding if the model begins with one, otherwise 0."""
    import keras

    layers = [layer for layer in keras_model._flatten_layers() if layer.weights and not layer._layers]
    embeddings = [layer.input_dim for layer in layers if isinstance(layer, keras.layers.Embedding)]
    return min(embeddings) if embeddings and isinstance(layers[0], keras.layers.Embedding) else 0
