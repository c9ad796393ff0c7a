"""Detection of the installed frameworks, without importing them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hvd_slowmo.installer.errors import InstallError

MINIMUM: Mapping[str, tuple[int, int]] = MappingProxyType({"torch": (2, 1), "tensorflow": (2, 16)})
"""The oldest supported version of each framework, as (major, minor)."""

TITLES: Mapping[str, str] = MappingProxyType({"torch": "PyTorch", "tensorflow": "TensorFlow"})

_TENSORFLOW_DISTRIBUTIONS = ("tensorflow", "tensorflow-cpu", "tf-nightly", "tf-nightly-cpu", "tensorflow-rocm")


@dataclass(frozen=True)
class Framework:
    """An installed framework.

    Attributes:
        name: import name, "torch" or "tensorflow".
        version: full version with the local part, such as "2.13.0+cpu".
        cuda: True if it was built with CUDA.
        cxx: the oldest C++ standard with which its headers compile, such as 17.
    """

    name: str
    version: str
    cuda: bool
    cxx: int = 17

    @property
    def title(self) -> str:
        """Return the name as written in prose, such as "PyTorch"."""
        return TITLES[self.name]

    @property
    def supported(self) -> bool:
        """Return True if the version is at least the one in `MINIMUM`."""
        return release(self.version) >= MINIMUM[self.name]


def release(version: str) -> tuple[int, int]:
    """Return the major and minor number of `version`, or (0, 0) if it does not start with two numbers."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


def detect() -> tuple[Framework, ...]:
    """Return the installed frameworks in any version, PyTorch first."""
    return tuple(found for found in (_torch(), _tensorflow()) if found is not None)


def supported(found: tuple[Framework, ...]) -> tuple[Framework, ...]:
    """Return the frameworks in `found` that are new enough.

    Raises:
        InstallError: none is new enough, or `found` is empty.
    """
    usable = tuple(framework for framework in found if framework.supported)
    if usable:
        return usable
    wanted = " or ".join(f"{TITLES[name]} >= {major}.{minor}" for name, (major, minor) in MINIMUM.items())
    if found:
        have = ", ".join(f"{framework.title} {framework.version}" for framework in found)
        cause = f"Horovod is built against {wanted}, but this environment has only {have}."
    else:
        cause = f"Horovod is built against {wanted}, but this environment has neither."
    raise InstallError(
        cause, "install the framework first, for instance with `pip install torch` or `pip install tensorflow`."
    )


def package_folder(name: str) -> Path | None:
    """Return the directory of the installed package `name`, or None if it is not installed.

    A directory without `__init__.py`, such as `torch/` at the root of this project's checkout, imports as an empty
    namespace package when the real package is absent. It has no origin and is ignored.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def _torch() -> Framework | None:
    folder = package_folder("torch")
    if folder is None:
        return None
    # PyTorch's build writes torch/version.py. Unlike the distribution's version, this one has the suffix "+cu130".
    text = _read(folder / "version.py")
    version = re.search(r"""^__version__\s*=\s*['"]([^'"]+)['"]""", text, re.MULTILINE)
    cuda = re.search(r"""^cuda\b[^=\n]*=\s*['"]""", text, re.MULTILINE)
    # "C++20 or later compatible compiler is required to use ATen."
    standard = re.search(r"C\+\+(\d\d) or later", _read(folder / "include" / "ATen" / "ATen.h"))
    return Framework(
        name="torch",
        version=version.group(1) if version else _distribution_version("torch"),
        cuda=cuda is not None,
        cxx=max(17, int(standard.group(1))) if standard else 17,
    )


def _tensorflow() -> Framework | None:
    folder = package_folder("tensorflow")
    if folder is None:
        return None
    build_info = _read(folder / "python" / "platform" / "build_info.py")
    cuda = re.search(r"""['"]is_cuda_build['"]\s*[,:]\s*True""", build_info)
    return Framework("tensorflow", _distribution_version(*_TENSORFLOW_DISTRIBUTIONS), cuda is not None)


def _distribution_version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "0.0+unknown"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
