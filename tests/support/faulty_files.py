"""Seeded faults: values of the wrong type, order or range, and checkpoints that somebody has forged.

Nothing here uses the library's own readers or writers, so that a fault can have right checksums.
"""

import copy
import hashlib
import json
import traceback
from pathlib import Path

import numpy as np
import torch

DEEP = "@deep@"
"""Stands for lists within each other, 100,000 deep."""

ODD = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**70), 0.5, -0.5, float("inf"), float("nan"), 1e308),
    *("", "x", "0", "../../x", "\x1b[2J\x1b]0;x\x07", "\u202e", "model/0.linear.weight", "\n", "9" * 40),
    *([], [[]], [1, 2], [[0.5]], {}, {"x": 1}, {"tensor": "float32"}, DEEP),
]

DTYPES = {"F32": "float32", "F64": "float64", "I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool"}


def deep_list():
    result = []
    for _ in range(100_000):
        result = [result]
    return result


def odd(rng):
    return copy.deepcopy(ODD[rng.integers(len(ODD))])


def altered(value, rng):
    """Return a copy of a structure with one fault at one place, and the fault in words."""
    if rng.random() < 0.02:
        return odd(rng), "another whole"
    value = _copied(value)
    containers = [(path, part) for path, part in _parts(value) if isinstance(part, (dict, list)) and len(part)]
    if not containers:
        return odd(rng), "another whole"
    path, part = containers[rng.integers(len(containers))]
    keys = list(part) if isinstance(part, dict) else list(range(len(part)))
    key = keys[rng.integers(len(keys))]
    kind = ("missing", "odd", "odd", "odd", "near", "near", "order", "added", "renamed", "swapped")[rng.integers(10)]
    if kind == "missing":
        del part[key]
    elif kind == "odd":
        part[key] = odd(rng)
    elif kind == "near":
        part[key] = _near(part[key], rng)
    elif kind == "order":
        if isinstance(part, dict):
            values = [part.pop(k) for k in keys]
            part.update(zip(reversed(keys), values, strict=True))
        else:
            part.reverse()
    elif kind == "added" or (kind == "renamed" and isinstance(part, list)):
        if isinstance(part, dict):
            part[f"{key}x" if isinstance(key, str) else len(keys) + 3] = odd(rng)
        else:
            part.insert(int(rng.integers(len(part) + 1)), odd(rng))
    elif kind == "renamed":
        part[f"{key}x" if isinstance(key, str) else str(key)] = part.pop(key)
    else:
        other = keys[rng.integers(len(keys))]
        part[key], part[other] = part[other], part[key]
    return value, f"{kind} at {'.'.join(map(str, (*path, key)))}"


def _near(value, rng):
    """Return a value of the same type that is not this one, where there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + (1, -1, 0.5, 1000, -value - 1, 2**62)[rng.integers(6)]
    if isinstance(value, str):
        at = int(rng.integers(len(value) + 1))
        return value[:at] + "x/.*\x1b0"[rng.integers(6)] + value[at + int(rng.integers(2)) :]
    if isinstance(value, torch.Tensor):
        return _near_tensor(value, rng)
    if isinstance(value, list):
        return value[:-1] if rng.random() < 0.5 else value + value[-1:]
    if isinstance(value, tuple):
        return tuple(altered(list(value), rng)[0]) if value else (1,)
    return odd(rng)


def _near_tensor(tensor, rng):
    return (
        lambda: tensor.reshape(-1)[:-1].clone(),
        lambda: torch.cat([tensor.reshape(-1), torch.ones(1)]),
        lambda: tensor.reshape(1, *tensor.shape).clone(),
        lambda: torch.tensor(2.0),
        lambda: tensor.double() if tensor.dtype != torch.float64 else tensor.float(),
        lambda: tensor.long(),
        lambda: tensor.tolist(),
        lambda: tensor.to(torch.complex64),
    )[rng.integers(8)]()


def _copied(value):
    """Return a copy with lists in place of tuples within it left as they are, and tensors of their own."""
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_copied(part) for part in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def _parts(value, path=()):
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _parts(part, (*path, key))


def deepened(value):
    """Return a structure with the lists that DEEP stands for."""
    if isinstance(value, dict):
        return {deepened(key): deepened(part) for key, part in value.items()}
    if isinstance(value, list):
        return [deepened(part) for part in value]
    return deep_list() if isinstance(value, str) and value == DEEP else value


# Files


class RawFile:
    """A safetensors file in its parts: our header, and per array its type, shape and bytes."""

    def __init__(self, path):
        data = Path(path).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        self.ours = json.loads(header.pop("__metadata__")["hvd_slowmo"])
        self.arrays = {}
        for name, entry in header.items():
            start, stop = (8 + length + n for n in entry["data_offsets"])
            self.arrays[name] = [entry["dtype"], entry["shape"], data[start:stop]]

    def sign(self):
        """Make all checksums right."""
        self.ours["arrays"] = {name: checksum(*array) for name, array in self.arrays.items()}
        self.sign_header()

    def sign_header(self):
        text = dumped([self.ours.get("format"), self.ours.get("facts"), self.ours.get("arrays")])
        self.ours["id"] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def header(self):
        text = dumped(self.ours).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
        header, at = {"__metadata__": {"hvd_slowmo": text}}, 0
        for name, (dtype, shape, data) in self.arrays.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        return header

    def packed(self, header=None):
        text = json.dumps(self.header() if header is None else header).replace(
            json.dumps(DEEP), "[" * 100_000 + "]" * 100_000
        )
        text += " " * (-len(text) % 8)
        data = b"".join(data for _, _, data in self.arrays.values())
        return len(text.encode()).to_bytes(8, "little") + text.encode() + data


def dumped(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def checksum(dtype, shape, data):
    head = json.dumps([DTYPES.get(dtype, dtype), shape]).encode()
    return hashlib.blake2b(head + data, digest_size=16).hexdigest()


def forged(source, rng):
    """Return the bytes of an altered checkpoint file, and the fault in words. Most have right checksums."""
    raw = RawFile(source)
    kind = ("facts", "facts", "facts", "array", "array", "array", "ours", "header", "bytes")[rng.integers(9)]
    if kind == "facts":
        raw.ours["facts"], words = altered(raw.ours["facts"], rng)
        raw.sign_header()
    elif kind == "array":
        words = _alter_array(raw, rng)
        raw.sign()
    elif kind == "ours":
        raw.ours, words = altered(raw.ours, rng)
    elif kind == "header":
        header, words = altered(raw.header(), rng)
        return raw.packed(header), f"header: {words}"
    else:
        return _altered_bytes(raw.packed(), rng)
    return raw.packed(), f"{kind}: {words}"


def _alter_array(raw, rng):
    names = list(raw.arrays)
    if not names:
        raw.arrays["x"] = ["F32", [1], bytes(4)]
        return "added x"
    # Half of the time a scalar of the position, whose values matter most.
    scalars = [name for name in names if name.startswith("progress/")]
    among = scalars if scalars and rng.random() < 0.5 else names
    name = among[rng.integers(len(among))]
    array = raw.arrays[name]
    kind = ("missing", "renamed", "shape", "type", "values", "values", "values", "length", "swapped")[rng.integers(9)]
    if kind == "missing":
        del raw.arrays[name]
    elif kind == "renamed":
        parts = name.split("/")
        other = ("/".join(parts[:-1]), f"{name}/x", f"{name}\x1b[2J", "/".join(parts[1:]), f"x/{name}", f"/{name}")
        raw.arrays[other[rng.integers(6)]] = raw.arrays.pop(name)
    elif kind == "shape":
        array[1] = [*array[1], 1] if rng.random() < 0.5 else [1, *array[1]]
    elif kind == "type":
        array[0] = {"F32": "I32", "F64": "I64", "I64": "F64", "U8": "BOOL"}.get(array[0], "I8")
    elif kind == "values" and array[0] in DTYPES:
        value = (-1, 0, 1, 2**62, float("nan"), float("inf"), -1e308, 127)[rng.integers(8)]
        dtype = np.dtype(DTYPES[array[0]])
        if dtype.kind != "f":
            limits = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
            value = max(-1, limits[0]) if value != value else min(max(value, limits[0]), limits[1])
        with np.errstate(all="ignore"):
            filled = np.full(len(array[2]) // dtype.itemsize, int(value) if dtype.kind != "f" else value, dtype)
        array[2] = filled.tobytes()
    elif kind == "length" and array[1]:
        size = len(array[2]) // max(array[1][0], 1)
        array[1] = [array[1][0] + 1, *array[1][1:]]
        array[2] += array[2][:size] if array[1][0] > 1 else bytes(4)
    else:
        other = names[rng.integers(len(names))]
        raw.arrays[name], raw.arrays[other] = raw.arrays[other], raw.arrays[name]
    return f"{kind} of {name}"


def _altered_bytes(data, rng):
    data = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    at = int(rng.integers(header if rng.random() < 0.7 else len(data)))
    kind = ("flip", "truncated", "appended", "cut", "length", "repeated", "empty")[rng.integers(7)]
    if kind == "flip":
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "truncated":
        del data[at:]
    elif kind == "appended":
        data += bytes(int(rng.integers(1, 9)))
    elif kind == "cut":
        del data[at]
    elif kind == "length":
        data[:8] = int((2**63, 2**40, 0, 1, len(data))[rng.integers(5)]).to_bytes(8, "little")
    elif kind == "repeated":
        data[at:at] = data[at : at + int(rng.integers(1, 40))]
    else:
        data.clear()
    return bytes(data), f"bytes: {kind} at {at}"


def is_raised_by_us(error):
    """Return whether a `raise` of the library has raised an error, and not a faulty expression of it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "hvd_slowmo" in frame.filename and (frame.line or "").startswith("raise")
