"""The subcommand `convert`: a model's weights from one file format to another."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hvd_slowmo.cli.arguments import Wrong, given_map, looking_here, made

if TYPE_CHECKING:
    from hvd_slowmo.checkpoint.file import Arrays
    from hvd_slowmo_tf.interop.files import KerasFiles
    from hvd_slowmo_torch.interop.files import TorchFiles

T = TypeVar("T")

_TORCH, _KERAS, _PLAIN, _OWN = (".pt", ".pth", ".bin"), (".keras", ".weights.h5"), ".safetensors", ".slowmo"


def add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `convert` to the command line."""
    parser = commands.add_parser(
        "convert",
        help="turn a checkpoint or a file of weights into weights of another format",
        description="SOURCE is a checkpoint of SlowMo.save, or weights in any format of TARGET. The suffix of TARGET "
        "says which: .pt, .pth or .bin (a PyTorch state_dict), .keras or .weights.h5, .safetensors, or .slowmo, with "
        "which SlowMo.load begins a training. Plain .safetensors have PyTorch's names with --torch, otherwise those of "
        "the wire; both are read. The state of the training is left out: either framework can load a checkpoint as it "
        "is. Functions are looked up in the current directory too.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--torch", metavar="MODULE:FUNCTION", help="gives the PyTorch model; for PyTorch's files")
    parser.add_argument("--keras", metavar="MODULE:FUNCTION", help="gives the Keras model; for Keras' files")
    parser.add_argument("--map", metavar="MODULE:NAME", help="a ParameterMap, or a function that gives one")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    try:
        with looking_here():
            count = _Conversion(arguments).run()
    except (Wrong, ImportError, OSError, ValueError, TypeError) as error:
        print(f"hvd-slowmo convert: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.target}: {count} tensors")
    return 0


class _Conversion:
    """The models that were given, what they put on the wire, and the files in between."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._source, self._target = arguments.source, arguments.target
        if not self._source.is_file():
            raise Wrong(f"there is no file {self._source}.")
        parameter_map = given_map(arguments.map)
        self._torch: TorchFiles | None = None
        self._keras: KerasFiles | None = None
        if arguments.torch is not None:  # PyTorch first: the other way round its libraries may not load
            from hvd_slowmo_torch.interop.files import TorchFiles

            self._torch = TorchFiles(made(arguments.torch), parameter_map)
        if arguments.keras is not None:
            from hvd_slowmo_tf.interop.files import KerasFiles

            self._keras = KerasFiles(made(arguments.keras), parameter_map)
        self._named = [files.named for files in (self._torch, self._keras) if files is not None]

    def run(self) -> int:
        """Convert; how many tensors there are."""
        from hvd_slowmo.wire.parameter_map import pair

        if len(self._named) == 2:
            list(pair(*(named.entries for named in self._named)))
        values = self._read()
        self._write(values)
        return len(values)

    def _read(self) -> Arrays:
        """The values of the source by their names on the wire."""
        from hvd_slowmo.checkpoint.file import is_snapshot

        name = self._source.name
        if name.endswith(_TORCH):
            return _needed(self._torch, "--torch", self._source).read(self._source)
        if name.endswith(_KERAS):
            return _needed(self._keras, "--keras", self._source).read(self._source)
        return self._read_checkpoint() if is_snapshot(self._source) else self._read_plain()

    def _read_checkpoint(self) -> Arrays:
        from hvd_slowmo.checkpoint.file import read
        from hvd_slowmo.checkpoint.job import check_model

        facts, arrays, _ = read(self._source)
        if "rank" in facts or "model" in facts["lost"]:
            raise Wrong(
                f"{self._source} holds no parameters that all workers share: each had its own. Convert a checkpoint "
                "from right after an outer step or join()."
            )
        for named in self._named:
            check_model(named, facts)
        return {entry[0]: arrays[f"model/{entry[0]}"] for entry in facts["entries"]}

    def _read_plain(self) -> Arrays:
        from hvd_slowmo.checkpoint.file import read_plain

        values = read_plain(self._source)
        if not self._named:
            raise Wrong(f"{self._source} has names and arrays only. Give the model: --torch or --keras.")
        entries = self._named[0].entries
        lacking = [entry.name for entry in entries if entry.name not in values]
        if lacking and self._torch is not None and not set(lacking) & set(values):
            return self._torch.read_arrays(values, self._source)
        if lacking or len(values) != len(entries):
            odd = lacking or sorted(set(values) - {entry.name for entry in entries})
            raise Wrong(f"{self._source} is of another model: see {', '.join(odd[:3])}.")
        for entry in entries:
            if values[entry.name].shape != entry.shape:
                raise Wrong(f"{entry.name} has shape {values[entry.name].shape} in {self._source}, not {entry.shape}.")
        return {e.name: values[e.name].astype(_stored(e.dtype), copy=False) for e in entries}

    def _write(self, values: Arrays) -> None:
        name = self._target.name
        if name.endswith(_TORCH):
            _needed(self._torch, "--torch", self._target).write(values, self._target)
        elif name.endswith(_KERAS):
            _needed(self._keras, "--keras", self._target).write(values, self._target)
        elif name.endswith(_OWN):
            from hvd_slowmo.checkpoint.job import write_weights

            if not self._named:
                raise Wrong(f"{self._target} needs the model: give --torch or --keras MODULE:FUNCTION.")
            write_weights(self._target, self._named[0], values)
        elif name.endswith(_PLAIN):
            from safetensors.numpy import save_file

            from hvd_slowmo.checkpoint.file import atomically

            values = values if self._torch is None else self._torch.arrays(values)
            given = {key: value.copy(order="C") for key, value in values.items()}
            atomically(self._target, lambda path: save_file(given, path))
        else:
            raise Wrong(f"the suffix of {self._target} must be one of {', '.join((*_TORCH, *_KERAS, _PLAIN, _OWN))}.")


def _needed(files: T | None, option: str, file: Path) -> T:
    if files is None:
        raise Wrong(f"{file} needs the model: give {option} MODULE:FUNCTION.")
    return files


def _stored(dtype: str) -> str:
    """The type in which a checkpoint has values of this one."""
    return "float32" if dtype == "bfloat16" else dtype
