"""One file of named arrays: safetensors, with a checksum for each array and for all the rest, written atomically.

The same content gives the same bytes. Nothing in a file is ever executed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = 1
"""Version of what is in the files. A reader refuses newer ones."""

_KEY = "hvd_slowmo"  # one key only: the library writes several in no fixed order

TEMPORARY = r"\.\d+\."
"""What a file is called in front of its name while it is written, as a regular expression."""

Arrays = dict[str, NDArray[Any]]


class CheckpointError(ValueError):
    """A checkpoint that can't be read, or does not fit; nothing has been changed."""


def checksum(array: NDArray[Any]) -> str:
    """Of type, shape and every byte."""
    array = np.asarray(array, order="C")
    digest = hashlib.blake2b(json.dumps([str(array.dtype), array.shape]).encode(), digest_size=16)
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write(
    path: Path, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], sums: Mapping[str, str] | None = None
) -> None:
    """Write a file; whoever reads `path` meanwhile finds the old one or the new one, whole.

    Args:
        facts: JSON types.
        sums: the arrays' checksums, among others', where they are known already.

    Raises:
        OSError: it can't be written; what was there before still is.
    """
    sums = {name: checksum(array) if sums is None else sums[name] for name, array in arrays.items()}
    text = _dump({"format": FORMAT, "facts": facts, "arrays": sums, "id": identity(facts, sums)})
    given = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    atomically(path, lambda temporary: save_file(given, temporary, metadata={_KEY: text}))


def identity(facts: Mapping[str, Any], sums: Mapping[str, str]) -> str:
    """What tells the contents of files apart."""
    return hashlib.blake2b(_dump([FORMAT, facts, sums]).encode(), digest_size=16).hexdigest()


def read(path: Path) -> tuple[dict[str, Any], Arrays, str]:
    """Facts, arrays and identity of a file, all of it checked.

    Raises:
        CheckpointError: there is no such file; it is truncated, altered, of another kind, or of a newer version.
    """
    header = _header(path)
    if not isinstance(header, dict) or "format" not in header:
        raise _foreign(path)
    if header["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {header['format']!r}, this version of hvd-slowmo reads format {FORMAT}. Read it with "
            "the version that wrote it, or a newer one."
        )
    facts, sums = header.get("facts"), header.get("arrays")
    if not isinstance(facts, dict) or not isinstance(sums, dict) or header.get("id") != identity(facts, sums):
        raise CheckpointError(f"{path} has been altered: its header does not agree with its checksum. {_CURE}")
    arrays = _arrays(path)
    if arrays.keys() != sums.keys():
        raise CheckpointError(f"{path} has been altered: it does not hold the tensors that it lists. {_CURE}")
    for name, array in arrays.items():
        if checksum(array) != sums[name]:
            raise CheckpointError(f"{path} has been altered: {name!r} does not agree with its checksum. {_CURE}")
    return facts, arrays, header["id"]


def read_plain(path: Path) -> Arrays:
    """The arrays of any safetensors file. bfloat16, which NumPy lacks, comes as float32.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    _header(path)
    halves = _bfloat16(path)
    return {**halves, **_arrays(path, without=halves)}


def is_snapshot(path: Path) -> bool:
    """Whether a safetensors file says that it is a checkpoint.

    Raises:
        CheckpointError: it can't be read.
    """
    return isinstance(_header(path), dict)


_CURE = "Use another checkpoint, or a copy of this one."


def _header(path: Path) -> Any:
    """What we have written beside the arrays; None if there is nothing of the kind."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # The library takes any white space behind the header; what is written there is spaces.
            padded = file.read(min(length, path.stat().st_size))
        with safe_open(path, framework="np") as opened:
            metadata = opened.metadata() or {}
        if not padded.rstrip(b" ").endswith(b"}"):
            raise ValueError("its header does not end where it should")
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _damaged(path, error) from error
    if _KEY not in metadata:
        return None
    try:
        header = json.loads(metadata[_KEY])
    except ValueError as error:
        raise _damaged(path, error) from error
    if len(metadata) > 1 or _dump(header) != metadata[_KEY]:
        raise CheckpointError(f"{path} has been altered: its header is not as it was written. {_CURE}")
    return header


def _arrays(path: Path, without: Collection[str] = ()) -> Arrays:
    try:
        with safe_open(path, framework="np") as opened:
            names = [name for name in opened.keys() if name not in without]  # noqa: SIM118 - it is no mapping
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _bfloat16(path: Path) -> Arrays:
    """The bfloat16 tensors of a file whose header has been checked: the upper halves of float32."""
    found = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        for name, told in json.loads(file.read(length)).items():
            if name != "__metadata__" and told["dtype"] == "BF16":
                start, stop = told["data_offsets"]
                file.seek(8 + length + start)
                upper = np.frombuffer(file.read(stop - start), "<u2").astype(np.uint32)
                found[name] = (upper << 16).view(np.float32).reshape(told["shape"])
    return found


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is no checkpoint of hvd-slowmo, or it is damaged (truncated or altered): {error}. {_CURE}"
    )


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a safetensors file of something else, no checkpoint of hvd-slowmo. Plain weights are loaded into "
        "the model before the training begins, see `hvd-slowmo convert`."
    )


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def atomically(path: Path, work: Callable[[Path], object]) -> None:
    """Let `work` write a file beside `path`, of the same suffix, which then takes its place on the disk."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user wants files to be; the library makes them private
        work(temporary)
        temporary.chmod(mode)
        _to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _folder_to_disk(path.parent)  # the name too is on the disk then


def _folder_to_disk(path: Path) -> None:
    try:
        _to_disk(path)
    except OSError as error:
        # Some network and FUSE file systems can't do that for a folder, and keep names by ways of their own.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
