"""The subcommand `convert`: a model's weights from one file format to another."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvd_slowmo.given import Wrong, given_map, looking_here, made

if TYPE_CHECKING:
    from hvd_slowmo.safefile import Arrays
    from hvd_slowmo.snapshot_state import Named

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
        self._torch: Any = None
        self._keras: Any = None
        self._of_torch: Named | None = None
        self._of_keras: Named | None = None
        if arguments.torch is not None:  # PyTorch first: the other way round its libraries may not load
            from hvd_slowmo_torch.snapshot import named

            self._torch = made(arguments.torch)
            self._of_torch = named(self._torch, parameter_map)
        if arguments.keras is not None:
            from hvd_slowmo_tf.snapshot import named_variables

            self._keras = made(arguments.keras)
            self._of_keras, self._variables = named_variables(self._keras, parameter_map)

    def run(self) -> int:
        """Convert; how many tensors there are."""
        from hvd_slowmo.parameter_map import pair

        if self._of_torch is not None and self._of_keras is not None:
            list(pair(self._of_torch.entries, self._of_keras.entries))
        values = self._read()
        self._write(values)
        return len(values)

    def _read(self) -> Arrays:
        """The values of the source by their names on the wire."""
        from hvd_slowmo.safefile import is_snapshot

        name = self._source.name
        if name.endswith(_TORCH):
            self._fill_torch(self._loaded_by_torch())
            return self._from_torch()
        if name.endswith(_KERAS):
            self._fill_keras()
            return self._from_keras()
        return self._read_checkpoint() if is_snapshot(self._source) else self._read_plain()

    def _read_checkpoint(self) -> Arrays:
        from hvd_slowmo.safefile import read
        from hvd_slowmo.snapshot import check_model

        facts, arrays, _ = read(self._source)
        if "rank" in facts or "model" in facts["lost"]:
            raise Wrong(
                f"{self._source} holds no parameters that all workers share: each had its own. Convert a checkpoint "
                "from right after an outer step or join()."
            )
        for named in filter(None, (self._of_torch, self._of_keras)):
            check_model(named, facts)
        return {entry[0]: arrays[f"model/{entry[0]}"] for entry in facts["entries"]}

    def _read_plain(self) -> Arrays:
        from hvd_slowmo.safefile import read_plain

        values = read_plain(self._source)
        named = self._of_torch or self._of_keras
        if named is None:
            raise Wrong(f"{self._source} has names and arrays only. Give the model: --torch or --keras.")
        lacking = [entry.name for entry in named.entries if entry.name not in values]
        if lacking and self._torch is not None and not set(lacking) & set(values):
            self._fill_torch({name: _tensor(value) for name, value in values.items()})
            return self._from_torch()
        if lacking or len(values) != len(named.entries):
            odd = lacking or sorted(set(values) - {entry.name for entry in named.entries})
            raise Wrong(f"{self._source} is of another model: see {', '.join(odd[:3])}.")
        for entry in named.entries:
            if values[entry.name].shape != entry.shape:
                raise Wrong(f"{entry.name} has shape {values[entry.name].shape} in {self._source}, not {entry.shape}.")
        return {e.name: values[e.name].astype(_stored(e.dtype), copy=False) for e in named.entries}

    def _write(self, values: Arrays) -> None:
        from hvd_slowmo.safefile import atomically

        name = self._target.name
        if name.endswith(_TORCH):
            state = self._to_torch(values)
            import torch

            atomically(self._target, lambda path: torch.save(state, path))
        elif name.endswith(_KERAS):
            model = self._to_keras(values)
            atomically(self._target, model.save if name.endswith(".keras") else model.save_weights)
        elif name.endswith(_OWN):
            from hvd_slowmo.snapshot import write_weights

            named = self._of_torch or self._of_keras
            if named is None:
                raise Wrong(f"{self._target} needs the model: give --torch or --keras MODULE:FUNCTION.")
            write_weights(self._target, named, values)
        elif name.endswith(_PLAIN):
            from safetensors.numpy import save_file

            if self._torch is not None:
                from hvd_slowmo_torch.weights import array_of

                values = {key: array_of(x).copy() for key, x in self._to_torch(values).items()}
            given = {key: value.copy(order="C") for key, value in values.items()}
            atomically(self._target, lambda path: save_file(given, path))
        else:
            raise Wrong(f"the suffix of {self._target} must be one of {', '.join((*_TORCH, *_KERAS, _PLAIN, _OWN))}.")

    def _loaded_by_torch(self) -> dict[str, Any]:
        import torch

        try:
            state = torch.load(self._source, map_location="cpu", weights_only=True)
        except Exception as error:  # of a damaged file it raises whatever the bytes lead to
            raise Wrong(f"{self._source} is no file of PyTorch with tensors alone: {_spell(error)}") from error
        tensors = isinstance(state, dict) and all(isinstance(x, torch.Tensor) for x in state.values())
        if not tensors or not all(isinstance(name, str) for name in state):
            raise Wrong(f"{self._source} is no state_dict of a model: not all it has are tensors.")
        found: dict[str, Any] = state
        return found

    def _fill_torch(self, state: dict[str, Any]) -> None:
        try:
            self._needed(self._of_torch, "--torch", self._source).load_state_dict(state)
        except RuntimeError as error:
            raise Wrong(f"{self._source} is of another model: {error}") from error

    def _fill_keras(self) -> None:
        model = self._needed(self._of_keras, "--keras", self._source)
        try:
            model.load_weights(self._source)
        except Exception as error:  # of a damaged file Keras lets through whatever the libraries raise
            raise Wrong(
                f"{self._source} does not fill the Keras model: it is damaged, or of another model: {_spell(error)}"
            ) from error

    def _from_torch(self) -> Arrays:
        from hvd_slowmo_torch.weights import read_torch

        assert self._of_torch is not None, "the model has been filled"
        return read_torch(self._torch, self._of_torch.entries)

    def _to_torch(self, values: Arrays) -> dict[str, Any]:
        from hvd_slowmo_torch.weights import write_torch

        model = self._needed(self._of_torch, "--torch", self._target)
        assert self._of_torch is not None, "there is one where there is a model"
        write_torch(model, self._of_torch.entries, values)
        state: dict[str, Any] = model.state_dict()
        return state

    def _from_keras(self) -> Arrays:
        from hvd_slowmo_tf.weights import read_keras

        assert self._of_keras is not None, "the model has been filled"
        return read_keras(self._variables, self._of_keras.entries)

    def _to_keras(self, values: Arrays) -> Any:
        from hvd_slowmo_tf.weights import write_keras

        model = self._needed(self._of_keras, "--keras", self._target)
        assert self._of_keras is not None, "there is one where there is a model"
        write_keras(self._variables, self._of_keras.entries, values)
        return model

    def _needed(self, named: Named | None, option: str, file: Path) -> Any:
        if named is None:
            raise Wrong(f"{file} needs the model: give {option} MODULE:FUNCTION.")
        return self._torch if option == "--torch" else self._keras


def _tensor(value: Any) -> Any:
    import torch

    return torch.tensor(value)


def _stored(dtype: str) -> str:
    """The type in which a checkpoint has values of this one."""
    return "float32" if dtype == "bfloat16" else dtype


def _spell(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
