"""Which PyTorch parameter is which Keras variable: each side lists its own model alone, and both lists are the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo.wire.views import View

Orientation = View | str | tuple[int, ...]
"""How a Keras variable becomes PyTorch's tensor: see `ParameterMap`."""


@dataclass(frozen=True)
class Part:
    """A tensor of a layer, or a part of one, as an adapter finds it.

    role: neutral: "weight", "bias", "mean".
    rule, dtype, own, note: see `hvd_slowmo.wire.views.TensorSpec`.
    features: where the view's first axis is one of features: the feature map (h, w, c) of which they are the flattened
        form, () if they are none; None where the first axis is another.
    refusal: why the tensor can't be put on the wire as it is, None if it can.
    cure: what makes it possible: "pair" (an explicit pair, with `orient` where the view is a guess), "orient", or ""
        (another model).
    """

    role: str
    rule: str
    dtype: str
    own: str
    view: View
    note: str = ""
    features: tuple[int, ...] | None = None
    refusal: str | None = None
    cure: str = ""


@dataclass(frozen=True)
class Layer:
    """A layer with tensors of its own. `kind` is neutral: "linear", "conv"; `path` is the adapter's name of it."""

    path: str
    kind: str
    parts: tuple[Part, ...]


class _Placed(NamedTuple):
    key: tuple[Any, ...]  # sorts what is paired explicitly alike on both sides
    entry: TensorSpec


@dataclass(frozen=True)
class ParameterMap:
    """The map between a PyTorch model and its Keras version.

    Without pairs, the models have the same layers with weights in the same order. What is paired is taken out of both
    models first, and the rest must have the same layers in the same order.

    pairs: PyTorch's name of a layer or a tensor -> Keras' path of one: {"encoder.0": "encoder/dense"} pairs all tensors
        of two layers, {"scale": "scaled/scale"} two tensors. A * stands for one or more characters without a separator
        ("." or "/") and must stand for the same ones on both sides: {"blocks.*.fc": "block_*/fc"}.
    orient: Keras' path of a variable -> how it becomes PyTorch's tensor, where that can't be known from the model: the
        shape (h, w, c) of the feature map whose flattened form the variable's first axis takes, () where it takes none,
        "same", "transpose", or a `hvd_slowmo.wire.views.View`.
    ignore: names or paths, on either side, of tensors that are not trained and stay each worker's own.

    Raises:
        TypeError, ValueError: what is no such mapping; pairs with different numbers of *.
    """

    pairs: Mapping[str, str] = field(default_factory=dict)
    orient: Mapping[str, Orientation] = field(default_factory=dict)
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, mapping in (("pairs", self.pairs), ("orient", self.orient)):
            if not isinstance(mapping, Mapping):
                raise TypeError(f"`{name}` must be a mapping. Received: {name}={mapping!r}")
        for torch_name, keras_path in self.pairs.items():
            if not isinstance(torch_name, str) or not isinstance(keras_path, str):
                raise TypeError(f"`pairs` must map names to paths. Received: {torch_name!r}: {keras_path!r}")
            if torch_name.count("*") != keras_path.count("*"):
                raise ValueError(f"both sides of a pair must have as many *. Received: {torch_name!r}: {keras_path!r}")
        for path, orientation in self.orient.items():
            if not isinstance(orientation, (View, tuple)) and orientation not in ("same", "transpose"):
                raise ValueError(
                    "`orient` must give the shape of a feature map as a tuple, 'same', 'transpose' or a View. "
                    f"Received: {path!r}: {orientation!r}"
                )
        if isinstance(self.ignore, str):
            raise TypeError(f"`ignore` must be a sequence of names. Received: ignore={self.ignore!r}")

    def describe(self) -> dict[str, Any]:
        """What must be equal on all workers, in JSON types."""
        return {
            "pairs": [list(pair) for pair in self.pairs.items()],
            "orient": [[path, str(orientation)] for path, orientation in self.orient.items()],
            "ignore": list(self.ignore),
        }

    def arrange(self, layers: Sequence[Layer], side: str) -> list[TensorSpec]:
        """The wire entries of a model, in wire order: those of the layers in their order, then what is paired.

        Args:
            layers: all layers with tensors of their own, in the model's order.
            side: "torch" or "keras".

        Raises:
            ValueError: a tensor that can't be put on the wire; a pair, orientation or name to ignore that meets nothing
                of this model; a tensor that two pairs meet.
        """
        found = _Found(self, side)
        automatic: list[TensorSpec] = []
        paired: list[_Placed] = []
        number = 0
        for layer in layers:
            in_order = 0
            for part in layer.parts:
                if found.ignored(part):
                    continue
                placed = found.paired(layer, part)
                if placed is None:
                    name = f"{number}.{layer.kind}.{part.role}"
                    automatic.append(found.entry(layer, part, name, explicit=False))
                    in_order += 1
                else:
                    paired.append(placed)
            number += in_order > 0
        found.check(layers)
        paired.sort(key=lambda each: each.key)
        entries = [*automatic, *(each.entry for each in paired)]
        _unique(entries)
        return entries


class _Found:
    """What of a map has been met in one model."""

    def __init__(self, parameter_map: ParameterMap, side: str) -> None:
        self._map = parameter_map
        self._side = side
        separator = "." if side == "torch" else "/"
        own = [pair[side == "keras"] for pair in parameter_map.pairs.items()]
        self._patterns = [(text, _compile(text, separator)) for text in own]
        self._ignore = [(text, _compile(text, separator)) for text in parameter_map.ignore]
        self._orient = [(text, _compile(text, "/")) for text in parameter_map.orient] if side == "keras" else []
        self._met: set[str] = set()

    def ignored(self, part: Part) -> bool:
        hits = [text for text, pattern in self._ignore if pattern.fullmatch(part.own)]
        if hits and part.rule == "slow":
            raise ValueError(
                f"{self._spell(part)} is trained, so it can't be ignored ({hits[0]!r}): the workers' models would part."
            )
        return bool(hits)

    def paired(self, layer: Layer, part: Part) -> _Placed | None:
        """The entry of a tensor that a pair meets; its name is PyTorch's, which Keras' side takes from the pair."""
        hits = []
        for index, ((text, pattern), torch_name) in enumerate(zip(self._patterns, self._map.pairs, strict=True)):
            for tensor, name in ((True, part.own), (False, layer.path)):
                match = pattern.fullmatch(name)
                if match:
                    self._met.add(text)
                    captured = iter(match.groups())
                    full = "".join(part if part != "*" else next(captured) for part in re.split(r"(\*)", torch_name))
                    hits.append((text, tensor, (index, *map(_natural, match.groups()), part.role), full))
        if not hits:
            return None
        if len({text for text, *_ in hits}) > 1 or len(hits) > 1:
            raise ValueError(
                f"{self._spell(part)} has two partners: the pairs of {' and '.join(repr(h[0]) for h in hits)} both "
                "meet it. Leave one out."
            )
        _, tensor, key, full = hits[0]
        several = sum(other.own == part.own for other in layer.parts) > 1
        name = full if tensor and not several else f"{full}.{part.role}"
        return _Placed(key, self.entry(layer, part, name, explicit=tensor))

    def entry(self, layer: Layer, part: Part, name: str, explicit: bool) -> TensorSpec:
        hits = [text for text, pattern in self._orient if pattern.fullmatch(part.own)]
        view, oriented = part.view, bool(hits)
        if oriented:
            self._met.update(hits)
            view = self._oriented(part, hits[0])
        elif part.features:
            view = part.view.split(part.features)
        if part.refusal is not None:
            flat = len(part.view.own) < 2 or self._side == "torch"  # one orientation only
            if not (oriented and part.cure in ("orient", "pair")) and not (explicit and part.cure == "pair" and flat):
                hint = ""
                if part.cure == "pair":
                    hint = f"Pair it: ParameterMap({{{_pair(self._side, part.own)}}}"
                    hint += ")." if flat else f', orient={{"{part.own}": "same"}}), or "transpose", or a View.'
                elif part.cure == "orient":
                    hint = f'Say it: ParameterMap(orient={{"{part.own}": (height, width, channels)}}), or () if there '
                    hint += "is no feature map in it."
                raise ValueError(f"{self._spell(part)} (of {layer.path or 'the model'}): {part.refusal} {hint}".strip())
        return TensorSpec(name, part.rule, view.wire, part.dtype, view, part.own, part.note)

    def check(self, layers: Sequence[Layer]) -> None:
        """Every pair and orientation must have met something, or it is a slip."""
        names = [name for layer in layers for name in (layer.path, *(part.own for part in layer.parts))]
        for text, _ in (*self._patterns, *self._orient):
            if text not in self._met:
                raise ValueError(
                    f"{text!r} of the ParameterMap meets nothing of the {_FRAMEWORK[self._side]} model. "
                    f"{nearest(text, names)}"
                )

    def _oriented(self, part: Part, text: str) -> View:
        orientation = self._map.orient[text]
        own = part.view.own
        if isinstance(orientation, tuple):
            if part.features is None:
                raise ValueError(
                    f"{self._spell(part)} has no axis that could be a feature map: orient[{text!r}] = {orientation}."
                )
            return part.view.split(orientation) if orientation else part.view
        if isinstance(orientation, View):
            if orientation.own != own:
                raise ValueError(
                    f"orient[{text!r}] is for a variable of shape {orientation.own}, but {self._spell(part)} has {own}."
                )
            return orientation
        return View.permute(own, range(len(own)) if orientation == "same" else range(len(own))[::-1])

    def _spell(self, part: Part) -> str:
        return f"{_FRAMEWORK[self._side]}'s {part.own}" if self._side == "torch" else f"Keras' {part.own}"


_FRAMEWORK = {"torch": "PyTorch", "keras": "Keras"}


def nearest(text: str, names: Sequence[str]) -> str:
    """A sentence with the names most like `text`, or with none if there is none."""
    close = get_close_matches(text, list(dict.fromkeys(names)), n=3, cutoff=0.3)
    return f"Nearest: {', '.join(close)}." if close else "There is nothing like it."


def _compile(text: str, separator: str) -> re.Pattern[str]:
    return re.compile(f"([^{re.escape(separator)}]+)".join(re.escape(part) for part in text.split("*")))


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    """For sorting: "10" after "9"."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", text))


def _pair(side: str, own: str) -> str:
    return f'"{own}": "its Keras path"' if side == "torch" else f'"its PyTorch name": "{own}"'


def _unique(entries: Sequence[TensorSpec]) -> None:
    seen: dict[str, TensorSpec] = {}
    for entry in entries:
        if entry.name in seen:
            raise ValueError(
                f"{seen[entry.name].own} and {entry.own} both want to be {entry.name!r} on the wire: give the layers "
                "names of their own."
            )
        seen[entry.name] = entry


def pair(
    torch_entries: Sequence[TensorSpec], keras_entries: Sequence[TensorSpec]
) -> Iterator[tuple[TensorSpec, TensorSpec]]:
    """The entries of both sides, pair by pair.

    Raises:
        ValueError: the sides differ; the message names the first entry that differs and the nearest candidates.
    """
    keras_names = {entry.name: entry for entry in keras_entries}
    torch_names = {entry.name for entry in torch_entries}
    for number, entry in enumerate(torch_entries):
        partner = keras_names.get(entry.name)
        if partner is None:
            across = keras_entries[number : number + 1]
            there = f"In its place Keras has {_spell_entry(across[0])}. " if across else "Keras' model ends before it. "
            raise ValueError(
                f"PyTorch's {_spell_entry(entry)} has no partner. {there}{_candidates(entry, keras_entries)}{_CURE}"
            )
        if entry.describe() != partner.describe():
            what = next(
                f"{what} {mine} in PyTorch and {yours} in Keras"
                for what, mine, yours in (
                    ("shape", entry.shape, partner.shape),
                    ("type", entry.dtype, partner.dtype),
                    ("rule", entry.rule, partner.rule),
                    ("note", entry.note or "(none)", partner.note or "(none)"),
                )
                if mine != yours
            )
            hint = _candidates(entry, keras_entries) + _CURE if entry.shape != partner.shape else ""
            raise ValueError(f"{entry.name} ({entry.own} and {partner.own}) has {what}. {hint}".rstrip())
        yield entry, partner
    for entry in keras_entries:
        if entry.name not in torch_names:
            raise ValueError(f"Keras' {_spell_entry(entry)} has no partner. {_candidates(entry, torch_entries)}{_CURE}")


_CURE = "If the layers are the same in another order, pair them: ParameterMap({PyTorch's name: Keras' path})."


def _candidates(entry: TensorSpec, others: Sequence[TensorSpec]) -> str:
    """Those of the same shape and kind, most like in name first."""
    kind = entry.name.partition(".")[2]
    alike = [o for o in others if o.shape == entry.shape and o.name.partition(".")[2] == kind]
    alike = alike or [o for o in others if o.shape == entry.shape]
    if not alike:
        names = {o.own.replace("/", "."): o for o in others}
        alike = [names[name] for name in get_close_matches(entry.own.replace("/", "."), list(names), n=3, cutoff=0.3)]
    return f"Nearest: {', '.join(_spell_entry(each) for each in alike[:3])}. " if alike else ""


def _spell_entry(entry: TensorSpec) -> str:
    shape = "x".join(map(str, entry.shape)) or "scalar"
    return f"{entry.own} ({entry.name}, {shape})"
