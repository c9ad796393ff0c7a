"""ParameterMap: names that a PyTorch model and its Keras version share.

Each side lists its own model alone, and both lists must come out equal.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, TypeAlias

from hvd_slowmo.wire.tensors import Role, TensorSpec
from hvd_slowmo.wire.views import View

Framework: TypeAlias = Literal["torch", "keras"]

Orientation: TypeAlias = View | str | tuple[int, ...]
"""The way from a Keras variable to PyTorch's tensor: see `ParameterMap`."""

Fix: TypeAlias = Literal["", "pair", "orient"]
"""The remedy for a refused tensor: none; an explicit pair, with `orient` where the view is a guess; `orient`."""


@dataclass(frozen=True)
class Part:
    """A tensor of a layer, or a part of one, as an adapter describes it.

    Attributes:
        name: neutral, within the layer: "weight", "bias", "mean".
        role, dtype, own, note: see `hvd_slowmo.wire.tensors.TensorSpec`.
        view: from the framework's tensor to the wire's.
        features: where the view's first axis is one of features: the shape (h, w, c) of the feature map that they are
            flattened from, () if from none. None where the first axis is another.
        refusal: the reason why the tensor can't travel as it is; None if it can.
        fix: what lets it travel.
    """

    name: str
    role: Role
    dtype: str
    own: str
    view: View
    note: str = ""
    features: tuple[int, ...] | None = None
    refusal: str | None = None
    fix: Fix = ""


@dataclass(frozen=True)
class Layer:
    """A layer with tensors. `kind` is neutral: "linear", "conv"; `path` is the adapter's name of the layer."""

    path: str
    kind: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class ParameterMap:
    """The map between a PyTorch model and its Keras version.

    Without pairs, both models must have the same layers with weights in the same order. Paired layers and tensors are
    taken out of both models first, and the rest must have the same layers in the same order.

    Args:
        pairs: PyTorch's name of a layer or a tensor -> Keras' path of one: {"encoder.0": "encoder/dense"} pairs all
            tensors of two layers, {"scale": "scaled/scale"} two tensors. A * stands for one or more characters without
            a separator ("." or "/"), the same ones on both sides: {"blocks.*.fc": "block_*/fc"}.
        orient: Keras' path of a variable -> its orientation, where that does not follow from the model: the shape
            (h, w, c) of the feature map whose flattened form the variable's first axis takes, () if it takes none,
            "same", "transpose", or a `hvd_slowmo.wire.views.View`.
        ignore: names or paths, on either side, of tensors that are not trained and stay each worker's own.

    Raises:
        TypeError, ValueError: an argument of another form; a pair whose sides have different numbers of *.

    Example:
        >>> paired = ParameterMap({"encoder.*": "encoder/dense_*"}, orient={"head/kernel": (4, 4, 8)})
        >>> paired.describe()["pairs"]
        [['encoder.*', 'encoder/dense_*']]
    """

    pairs: Mapping[str, str] = field(default_factory=dict)
    orient: Mapping[str, Orientation] = field(default_factory=dict)
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, mapping in (("pairs", self.pairs), ("orient", self.orient)):
            if not isinstance(mapping, Mapping):
                raise TypeError(f"`{name}` must be a mapping. Received: {name}={reprlib.repr(mapping)}")
        for torch_name, keras_path in self.pairs.items():
            received = f"{reprlib.repr(torch_name)}: {reprlib.repr(keras_path)}"
            if not isinstance(torch_name, str) or not isinstance(keras_path, str):
                raise TypeError(f"`pairs` must map names to paths. Received: {received}")
            if torch_name.count("*") != keras_path.count("*"):
                raise ValueError(f"both sides of a pair must have as many *. Received: {received}")
        for path, orientation in self.orient.items():
            known = isinstance(orientation, View) or (
                isinstance(orientation, str) and orientation in ("same", "transpose")
            )
            if not isinstance(path, str) or not (known or _is_shape(orientation)):
                raise ValueError(
                    "`orient` must give, by a path, the shape of a feature map as a tuple, 'same', 'transpose' or a "
                    f"View. Received: {reprlib.repr(path)}: {reprlib.repr(orientation)}"
                )
        if isinstance(self.ignore, str) or not isinstance(self.ignore, Sequence):
            raise TypeError(f"`ignore` must be a sequence of names. Received: ignore={reprlib.repr(self.ignore)}")
        for name in self.ignore:
            if not isinstance(name, str):
                raise TypeError(f"`ignore` must be a sequence of names. Received: {reprlib.repr(name)} in it")

    def describe(self) -> dict[str, Any]:
        """Return what must be equal on all workers, in JSON types."""
        return {
            "pairs": [list(pair) for pair in self.pairs.items()],
            "orient": [[path, str(orientation)] for path, orientation in self.orient.items()],
            "ignore": list(self.ignore),
        }

    def arrange(self, layers: Sequence[Layer], framework: Framework) -> list[TensorSpec]:
        """Return a model's tensors in wire order: those of the layers in their order, then the paired ones.

        Args:
            layers: all layers with tensors, in the model's order.
            framework: of the model.

        Raises:
            ValueError: a tensor can't travel; a pair, orientation or name to ignore matches nothing of this model; two
                pairs match one tensor.
        """
        matcher = _Matcher(self, framework)
        unpaired: list[TensorSpec] = []
        paired: list[_Paired] = []
        number = 0
        for layer in layers:
            count = 0
            for part in layer.parts:
                if matcher.ignores(part):
                    continue
                match = matcher.pair(layer, part)
                if match is None:
                    name = f"{number}.{layer.kind}.{part.name}"
                    unpaired.append(matcher.spec(layer, part, name, explicit=False))
                    count += 1
                else:
                    paired.append(match)
            number += count > 0
        matcher.check_all_matched(layers)
        paired.sort(key=lambda match: match.key)
        specs = [*unpaired, *(match.spec for match in paired)]
        _check_unique(specs)
        return specs


class _Paired(NamedTuple):
    key: tuple[Any, ...]  # sorts explicit pairs alike on both sides
    spec: TensorSpec


class _Matcher:
    """The patterns of a map applied to one model, and those of them that have matched."""

    def __init__(self, parameter_map: ParameterMap, framework: Framework) -> None:
        self._map = parameter_map
        self._framework = framework
        separator = "." if framework == "torch" else "/"
        sides = [pair[framework == "keras"] for pair in parameter_map.pairs.items()]
        self._pairs = [(text, _compile(text, separator)) for text in sides]
        self._ignore = [(text, _compile(text, separator)) for text in parameter_map.ignore]
        self._orient = [(text, _compile(text, "/")) for text in parameter_map.orient] if framework == "keras" else []
        self._matched: set[str] = set()

    def ignores(self, part: Part) -> bool:
        """Return whether a tensor is to be ignored."""
        hits = [text for text, pattern in self._ignore if pattern.fullmatch(part.own)]
        if hits and part.role == "parameter":
            raise ValueError(
                f"{self._spell(part)} is trained, so it can't be ignored ({hits[0]!r}): the workers' models would "
                "diverge."
            )
        return bool(hits)

    def pair(self, layer: Layer, part: Part) -> _Paired | None:
        """Return the tensor of a part that a pair matches, under PyTorch's name, which Keras' side takes from the pair.

        None for a part that no pair matches.
        """
        hits = []
        for index, ((text, pattern), torch_name) in enumerate(zip(self._pairs, self._map.pairs, strict=True)):
            for is_tensor, name in ((True, part.own), (False, layer.path)):
                match = pattern.fullmatch(name)
                if match:
                    self._matched.add(text)
                    captured = iter(match.groups())
                    full = "".join(word if word != "*" else next(captured) for word in re.split(r"(\*)", torch_name))
                    hits.append((text, is_tensor, (index, *map(_natural, match.groups()), part.name), full))
        if not hits:
            return None
        if len(hits) > 1:
            raise ValueError(
                f"{self._spell(part)} has two partners: the pairs of {' and '.join(repr(hit[0]) for hit in hits)} both "
                "match it. Leave one out."
            )
        _, is_tensor, key, full = hits[0]
        several = sum(other.own == part.own for other in layer.parts) > 1
        name = full if is_tensor and not several else f"{full}.{part.name}"
        return _Paired(key, self.spec(layer, part, name, explicit=is_tensor))

    def spec(self, layer: Layer, part: Part, name: str, explicit: bool) -> TensorSpec:
        """Return a part as it travels under this name.

        Args:
            explicit: a pair names this very tensor.

        Raises:
            ValueError: it can't travel, and the map does not change that.
        """
        hits = [text for text, pattern in self._orient if pattern.fullmatch(part.own)]
        view, oriented = part.view, bool(hits)
        if oriented:
            self._matched.update(hits)
            view = self._oriented(part, hits[0])
        elif part.features:
            view = part.view.split(part.features)
        if part.refusal is not None:
            flat = len(part.view.own) < 2 or self._framework == "torch"  # one orientation only
            if not (oriented and part.fix) and not (explicit and part.fix == "pair" and flat):
                where = f"{self._spell(part)} (of {layer.path or 'the model'})"
                raise ValueError(f"{where}: {part.refusal} {self._fix(part, flat)}".strip())
        return TensorSpec(name, part.role, view.wire, part.dtype, view, part.own, part.note)

    def check_all_matched(self, layers: Sequence[Layer]) -> None:
        """Refuse a pair or an orientation that has matched nothing: it is a slip."""
        names = [name for layer in layers for name in (layer.path, *(part.own for part in layer.parts))]
        for text, _ in (*self._pairs, *self._orient):
            if text not in self._matched:
                raise ValueError(
                    f"{text!r} of the ParameterMap matches nothing of the {_TITLES[self._framework]} model. "
                    f"{nearest(text, names)}"
                )

    def _oriented(self, part: Part, text: str) -> View:
        orientation = self._map.orient[text]
        shape = part.view.own
        if isinstance(orientation, tuple):
            if part.features is None:
                raise ValueError(
                    f"{self._spell(part)} has no axis that could be a feature map: orient[{text!r}] = {orientation}."
                )
            return part.view.split(orientation) if orientation else part.view
        if isinstance(orientation, View):
            if orientation.own != shape:
                raise ValueError(
                    f"orient[{text!r}] is for a variable of shape {orientation.own}, but {self._spell(part)} has "
                    f"{shape}."
                )
            return orientation
        return View.permute(shape, range(len(shape)) if orientation == "same" else range(len(shape))[::-1])

    def _fix(self, part: Part, flat: bool) -> str:
        if part.fix == "pair":
            pair = (
                f'"{part.own}": "its Keras path"' if self._framework == "torch" else f'"its PyTorch name": "{part.own}"'
            )
            return f"Pair it: ParameterMap({{{pair}}}" + (
                ")." if flat else f', orient={{"{part.own}": "same"}}), or "transpose", or a View.'
            )
        if part.fix == "orient":
            return (
                f'Give it: ParameterMap(orient={{"{part.own}": (height, width, channels)}}), or () where there is no '
                "feature map."
            )
        return ""

    def _spell(self, part: Part) -> str:
        return f"{_TITLES[self._framework]}'{'s' if self._framework == 'torch' else ''} {part.own}"


_TITLES: dict[Framework, str] = {"torch": "PyTorch", "keras": "Keras"}


def nearest(text: str, names: Sequence[str]) -> str:
    """Return a sentence with the names most like `text`.

    Example:
        >>> nearest("0.wieght", ["0.weight", "1.bias"])
        'Nearest: 0.weight.'
    """
    close = get_close_matches(text, list(dict.fromkeys(names)), n=3, cutoff=0.3)
    return f"Nearest: {', '.join(close)}." if close else "No name is like it."


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)


def _compile(text: str, separator: str) -> re.Pattern[str]:
    return re.compile(f"([^{re.escape(separator)}]+)".join(re.escape(part) for part in text.split("*")))


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts "10" after "9"."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", text))


def _check_unique(specs: Sequence[TensorSpec]) -> None:
    seen: dict[str, TensorSpec] = {}
    for spec in specs:
        if spec.name in seen:
            raise ValueError(
                f"{seen[spec.name].own} and {spec.own} would both be {spec.name!r} on the wire. Give the layers "
                "different names."
            )
        seen[spec.name] = spec


def pair(
    torch_specs: Sequence[TensorSpec], keras_specs: Sequence[TensorSpec]
) -> Iterator[tuple[TensorSpec, TensorSpec]]:
    """Yield the tensors of both sides, pair by pair.

    Raises:
        ValueError: the sides differ; the message names the first difference and the nearest candidates.

    Example:
        >>> spec = TensorSpec("w", "parameter", (2,), "float32", View.same((2,)), "weight")
        >>> [(a.own, b.own) for a, b in pair([spec], [spec])]
        [('weight', 'weight')]
    """
    keras_names = {spec.name: spec for spec in keras_specs}
    torch_names = {spec.name for spec in torch_specs}
    for number, spec in enumerate(torch_specs):
        partner = keras_names.get(spec.name)
        if partner is None:
            across = keras_specs[number : number + 1]
            place = f"In its place Keras has {_spell(across[0])}. " if across else "Keras' model ends before it. "
            raise ValueError(f"PyTorch's {_spell(spec)} has no partner. {place}{_candidates(spec, keras_specs)}{_FIX}")
        if spec.describe() != partner.describe():
            hint = _candidates(spec, keras_specs) + _FIX if spec.shape != partner.shape else ""
            names = f"{spec.name} ({spec.own} and {partner.own})"
            raise ValueError(f"{names} has {_difference(spec, partner)}. {hint}".rstrip())
        yield spec, partner
    for spec in keras_specs:
        if spec.name not in torch_names:
            raise ValueError(f"Keras' {_spell(spec)} has no partner. {_candidates(spec, torch_specs)}{_FIX}")


_FIX = "If the layers are the same in another order, pair them: ParameterMap({PyTorch's name: Keras' path})."


def _difference(spec: TensorSpec, partner: TensorSpec) -> str:
    values = (
        ("shape", spec.shape, partner.shape),
        ("type", spec.dtype, partner.dtype),
        ("role", spec.role, partner.role),
        ("note", spec.note or "(none)", partner.note or "(none)"),
    )
    return next(f"{name} {a} in PyTorch and {b} in Keras" for name, a, b in values if a != b)


def _candidates(spec: TensorSpec, others: Sequence[TensorSpec]) -> str:
    """Return a sentence with the tensors of the same shape and kind; else those most like in name."""
    kind = spec.name.partition(".")[2]
    alike = [o for o in others if o.shape == spec.shape and o.name.partition(".")[2] == kind]
    alike = alike or [o for o in others if o.shape == spec.shape]
    if not alike:
        names = {o.own.replace("/", "."): o for o in others}
        alike = [names[name] for name in get_close_matches(spec.own.replace("/", "."), list(names), n=3, cutoff=0.3)]
    return f"Nearest: {', '.join(map(_spell, alike[:3]))}. " if alike else ""


def _spell(spec: TensorSpec) -> str:
    shape = "x".join(map(str, spec.shape)) or "scalar"
    return f"{spec.own} ({spec.name}, {shape})"
