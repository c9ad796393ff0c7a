"""The subcommand `convert`: a model's weights from one file format to another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hvd_slowmo.checkpoint.compatibility import check_model
from hvd_slowmo.checkpoint.facts import WorkerFacts
from hvd_slowmo.checkpoint.file import Arrays, is_checkpoint, is_training, read, read_plain, write_plain
from hvd_slowmo.checkpoint.job import model_arrays, write_weights
from hvd_slowmo.checkpoint.leftovers import remove_leftovers, writing
from hvd_slowmo.checkpoint.naming import NamedTensors
from hvd_slowmo.cli.arguments import importing_from_here, model_named, parameter_map_named, refusals
from hvd_slowmo.cli.console import show
from hvd_slowmo.errors import CommandError
from hvd_slowmo.wire.parameter_map import pair

if TYPE_CHECKING:
    from hvd_slowmo_tf.interop.files import KerasFiles
    from hvd_slowmo_torch.interop.files import TorchFiles

T = TypeVar("T")

_TORCH, _KERAS = (".pt", ".pth", ".bin"), (".keras", ".weights.h5")
_PLAIN, _CHECKPOINT = ".safetensors", ".slowmo"


def add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `convert` to the command line."""
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint or a file of weights into weights of another format",
        description="SOURCE is a checkpoint of SlowMo.save, or weights in any format of TARGET. The suffix of TARGET "
        "is its format: .pt, .pth or .bin (a PyTorch state_dict), .keras or .weights.h5, .safetensors, or .slowmo, "
        "with which SlowMo.load begins a training. Plain .safetensors have PyTorch's names with --torch, otherwise the "
        "wire's; both are read. The state of the training is left out: either framework can load a checkpoint as it "
        "is. Functions are looked up in the current directory too.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--torch", metavar="MODULE:FUNCTION", help="returns the PyTorch model; for PyTorch's files")
    parser.add_argument("--keras", metavar="MODULE:FUNCTION", help="returns the Keras model; for Keras' files")
    parser.add_argument("--map", metavar="MODULE:NAME", help="a ParameterMap, or a function that returns one")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    with importing_from_here():
        count = _Conversion(arguments).run()
    show(f"{arguments.target}: {count} tensors")
    return 0


class _Conversion:
    """A source, a target, and the models between them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._source: Path = arguments.source
        self._target: Path = arguments.target
        if not self._source.is_file():
            raise CommandError(f"there is no file {self._source}.")
        _check_target(self._source, self._target)
        parameter_map = parameter_map_named(arguments.map)
        self._torch: TorchFiles | None = None
        self._keras: KerasFiles | None = None
        if arguments.torch is not None:  # PyTorch first: the other way round its libraries may not load
            from hvd_slowmo_torch.interop.files import TorchFiles

            torch_model = model_named(arguments.torch, "PyTorch")
            with refusals():
                self._torch = TorchFiles(torch_model, parameter_map)
        if arguments.keras is not None:
            from hvd_slowmo_tf.interop.files import KerasFiles

            keras_model = model_named(arguments.keras, "Keras")
            with refusals():
                self._keras = KerasFiles(keras_model, parameter_map)
        self._models: list[NamedTensors] = [files.tensors for files in (self._torch, self._keras) if files is not None]

    def run(self) -> int:
        """Convert, and return the number of tensors."""
        if len(self._models) == 2:
            with refusals():
                list(pair(*(tensors.specs for tensors in self._models)))
        values = self._read()
        with writing(self._target) as locked:
            if locked:
                remove_leftovers(self._target)
            self._write(values)
        return len(values)

    def _read(self) -> Arrays:
        """Return the values of the source by their names on the wire."""
        name = self._source.name
        if name.endswith(_TORCH):
            return _needed(self._torch, "--torch", self._source).read(self._source)
        if name.endswith(_KERAS):
            return _needed(self._keras, "--keras", self._source).read(self._source)
        return self._read_checkpoint() if is_checkpoint(self._source) else self._read_plain()

    def _read_checkpoint(self) -> Arrays:
        facts, arrays, _ = read(self._source)
        if isinstance(facts, WorkerFacts) or "model" in facts.per_worker:
            raise CommandError(
                f"{self._source} holds no parameters that all workers share: each had its own. Convert a checkpoint "
                "saved right after an outer step or join()."
            )
        for tensors in self._models:
            check_model(tensors, facts)
        return {name.removeprefix("model/"): value for name, value in model_arrays(facts, arrays).items()}

    def _read_plain(self) -> Arrays:
        values = read_plain(self._source)
        if not self._models:
            raise CommandError(f"{self._source} has names and arrays only. Give the model: --torch or --keras.")
        specs = self._models[0].specs
        missing = [spec.name for spec in specs if spec.name not in values]
        if self._torch is not None and (missing or len(values) != len(specs)):
            return self._torch.read_arrays(values, self._source)
        if missing or len(values) != len(specs):
            odd = missing or sorted(set(values) - {spec.name for spec in specs})
            raise CommandError(f"{self._source} is of another model: see {', '.join(odd[:3])}.")
        for spec in specs:
            shape = values[spec.name].shape
            if shape != spec.shape:
                raise CommandError(f"{spec.name} has shape {shape} in {self._source}, not {spec.shape}.")
        return {spec.name: values[spec.name].astype(_stored(spec.dtype), copy=False) for spec in specs}

    def _write(self, values: Arrays) -> None:
        name = self._target.name
        if name.endswith(_TORCH):
            _needed(self._torch, "--torch", self._target).write(values, self._target)
        elif name.endswith(_KERAS):
            _needed(self._keras, "--keras", self._target).write(values, self._target)
        elif name.endswith(_CHECKPOINT):
            if not self._models:
                raise CommandError(f"{self._target} needs the model: give --torch or --keras MODULE:FUNCTION.")
            write_weights(self._target, self._models[0], values)
        elif name.endswith(_PLAIN):
            write_plain(self._target, values if self._torch is None else self._torch.arrays(values))
        else:
            suffixes = ", ".join((*_TORCH, *_KERAS, _PLAIN, _CHECKPOINT))
            raise CommandError(f"the suffix of {self._target} must be one of {suffixes}.")


def _check_target(source: Path, target: Path) -> None:
    """Refuse to replace what can't be had again: the source, or the state of a training."""
    if target.exists() and target.samefile(source):
        raise CommandError(f"{target} is the source itself. Give another target.")
    if target.is_file() and is_training(target):
        raise CommandError(
            f"{target} is the checkpoint of a training, whose state would be lost. Give another target, or remove it."
        )


def _needed(files: T | None, option: str, file: Path) -> T:
    if files is None:
        raise CommandError(f"{file} needs the model: give {option} MODULE:FUNCTION.")
    return files


def _stored(dtype: str) -> str:
    """Return the type in which a checkpoint has values of this one."""
    return "float32" if dtype == "bfloat16" else dtype
