"""One file of named arrays: safetensors with a checksum of each array and of the header, written atomically.

The same content gives the same bytes. Nothing in a file is ever executed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import reprlib
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hvd_slowmo.checkpoint.bounded_json import MAX_LENGTH, decode
from hvd_slowmo.checkpoint.facts import Checksum, Facts, parse, parse_facts, plain
from hvd_slowmo.checkpoint.paths import temporary_directory
from hvd_slowmo.errors import CheckpointError

FORMAT = 3
"""Version of the names and values in the files. A reader refuses every other one."""

_KEY = "hvd_slowmo"  # one key only: the library writes several in no fixed order

MAX_HEADER = 100_000_000
"""Bytes of a file's header. The library refuses longer ones too."""

Arrays = dict[str, NDArray[Any]]


class _Header(Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    facts: dict[str, Any]
    arrays: dict[str, Checksum]
    id: Checksum


def checksum(array: NDArray[Any]) -> str:
    """Return the checksum of an array's type, shape and bytes.

    Example:
        >>> checksum(np.zeros(2)) == checksum(np.zeros((2, 1)))
        False
    """
    array = np.asarray(array, order="C")
    digest = hashlib.blake2b(json.dumps([str(array.dtype), array.shape]).encode(), digest_size=16)
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write(path: Path, facts: Facts, arrays: Mapping[str, NDArray[Any]], sums: Mapping[str, str] | None = None) -> None:
    """Write a file. Readers of `path` find the old one or the new one, whole, at any time.

    Args:
        sums: checksums by the arrays' names, where they are known already.

    Raises:
        CheckpointError: there are more arrays than a reader would take.
        OSError: it can't be written; the old file is still there.

    Example:
        >>> import tempfile
        >>> from hvd_slowmo.checkpoint.facts import WorkerFacts
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "checkpoint"
        ...     write(path, WorkerFacts(rank=0, workers=2), {"x": np.ones(2)})
        ...     facts, arrays, _ = read(path)
        >>> facts, arrays["x"].tolist()
        (WorkerFacts(rank=0, workers=2), [1.0, 1.0])
    """
    sums = {name: checksum(array) if sums is None else sums[name] for name, array in arrays.items()}
    text = _dump({"format": FORMAT, "facts": plain(facts), "arrays": sums, "id": identity(facts, sums)})
    if len(text) > MAX_LENGTH:
        raise CheckpointError(
            f"{path} would have {len(text)} characters of facts, and a reader takes {MAX_LENGTH}: {len(arrays)} arrays "
            "are too many for one checkpoint."
        )
    in_order = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    replace_atomically(path, lambda temporary: _save(in_order, temporary, {_KEY: text}))


def write_plain(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as any program reads them: a safetensors file without anything of ours.

    Raises:
        OSError: it can't be written; the old file is still there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "weights.safetensors"
        ...     write_plain(path, {"x": np.ones(2)})
        ...     read_plain(path)["x"].tolist()
        [1.0, 1.0]
    """
    in_order = {name: array.copy(order="C") for name, array in arrays.items()}
    # Loaders of the field refuse a file that does not say where its names and layouts come from.
    replace_atomically(path, lambda temporary: _save(in_order, temporary, {"format": "pt"}))


def _save(arrays: Arrays, path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(arrays, path, metadata=metadata)
    except SafetensorError as error:  # the system's own error is in its text alone
        code = re.search(r"\b(?:code:|os error) (\d+)", str(error))
        number = errno.EIO if code is None else int(code.group(1))
        text = str(error) if code is None else os.strerror(number)
        raise OSError(number, text, str(path)) from error


def identity(facts: Facts, sums: Mapping[str, str]) -> str:
    """Return a text that tells the contents of files apart."""
    return _identity(plain(facts), sums)


def _identity(facts: Mapping[str, Any], sums: Mapping[str, str]) -> str:
    return hashlib.blake2b(_dump([FORMAT, facts, sums]).encode(), digest_size=16).hexdigest()


def read(path: Path) -> tuple[Facts, Arrays, str]:
    """Return the facts, arrays and identity of a file, all of it checked.

    Raises:
        CheckpointError: the file is missing, truncated, altered, of another kind, or of another version.
    """
    facts, sums, id_ = read_facts(path)
    arrays = _arrays(path)
    if arrays.keys() != sums.keys():
        raise CheckpointError(f"{path} has been altered: it does not hold the tensors that it lists. {_FIX}")
    for name, array in arrays.items():
        if checksum(array) != sums[name]:
            raise CheckpointError(f"{path} has been altered: {name!r} does not agree with its checksum. {_FIX}")
    return facts, arrays, id_


def read_facts(path: Path) -> tuple[Facts, dict[str, str], str]:
    """Return the facts of a file, the checksums of its arrays, and its identity; the arrays are not read.

    Raises:
        CheckpointError: as `read`, but for the arrays.
    """
    header = _header(path)
    if not isinstance(header, dict) or "format" not in header:
        raise _foreign(path)
    if header["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {reprlib.repr(header['format'])}, this version of hvd-slowmo reads format {FORMAT}. "
            "Load it with the version that wrote it."
        )
    checked = parse(header, _Header, f"the header of {path}")
    if checked.id != _identity(checked.facts, checked.arrays):
        raise CheckpointError(f"{path} has been altered: its header does not agree with its checksum. {_FIX}")
    return parse_facts(checked.facts, f"the header of {path}"), checked.arrays, checked.id


def read_plain(path: Path) -> Arrays:
    """Return the arrays of any safetensors file; bfloat16, which NumPy lacks, as float32.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    _header(path)
    try:
        halves = _bfloat16(path)
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # two entries of one name, for instance
        raise _damaged(path, error) from error
    return {**halves, **_arrays(path, without=halves)}


def is_checkpoint(path: Path) -> bool:
    """Return whether a safetensors file is a checkpoint, by its header.

    Raises:
        CheckpointError: it can't be read.
    """
    return isinstance(_header(path), dict)


def is_training(path: Path) -> bool:
    """Return whether a file is part of a training's checkpoint, of whatever version; False if it can't be read."""
    try:
        header = _header(path)
    except CheckpointError:
        return False
    if not isinstance(header, dict):
        return False
    facts = header.get("facts")
    return not isinstance(facts, dict) or "rank" in facts or facts.get("config") is not None


_FIX = "Use another checkpoint, or a copy of this one."


def _header(path: Path) -> Any:
    """Return our header beside the arrays; None if there is none."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER}")
            # The library accepts any white space behind the header, and writes spaces.
            padded = file.read(length)
        with safe_open(path, framework="np") as opened:
            metadata = opened.metadata() or {}
        if not padded.rstrip(b" ").endswith(b"}"):
            raise ValueError("its header does not end where it should")
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _damaged(path, error) from error
    if _KEY not in metadata:
        return None
    try:
        header = decode(metadata[_KEY])
    except ValueError as error:
        raise _damaged(path, error) from error
    if len(metadata) > 1 or _dump(header) != metadata[_KEY]:
        raise CheckpointError(f"{path} has been altered: its header is not as it was written. {_FIX}")
    return header


def _arrays(path: Path, without: Collection[str] = ()) -> Arrays:
    try:
        with safe_open(path, framework="np") as opened:
            names = [name for name in opened.keys() if name not in without]  # noqa: SIM118 - it is no mapping
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _bfloat16(path: Path) -> Arrays:
    """Return the bfloat16 tensors of a file whose header has been checked: upper halves of float32."""
    arrays = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        for name, entry in json.loads(file.read(length)).items():
            if name != "__metadata__" and entry["dtype"] == "BF16":
                start, stop = entry["data_offsets"]
                file.seek(8 + length + start)
                upper = np.frombuffer(file.read(stop - start), "<u2").astype(np.uint32)
                arrays[name] = (upper << 16).view(np.float32).reshape(entry["shape"])
    return arrays


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is no checkpoint of hvd-slowmo, or it is damaged (truncated or altered): {error}. {_FIX}"
    )


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a safetensors file, but no checkpoint of hvd-slowmo. Turn plain weights into one with `hvd-slowmo "
        "convert`, or load them into the model before training."
    )


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def replace_atomically(path: Path, write_to: Callable[[Path], object]) -> None:
    """Have a file written beside `path`, with the same name; flush it and put it in the place of `path`.

    Args:
        write_to: writes the file at the path that it is given.

    Raises:
        OSError: the file can't be written; the old one is still there.
    """
    # A directory of our own: the library writes under a name that it makes up, and nobody else reads or replaces
    # the file before it is whole.
    directory = temporary_directory(path)
    shutil.rmtree(directory, ignore_errors=True)  # of a killed process that had the same number
    directory.mkdir(mode=0o700)
    try:
        temporary = directory / path.name
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's default; the library makes files private
        write_to(temporary)
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    _flush_directory(path.parent)  # for the name


def _flush_directory(path: Path) -> None:
    try:
        _flush(path)
    except OSError as error:
        # Some network and FUSE file systems can't flush a directory, and keep names by ways of their own.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
