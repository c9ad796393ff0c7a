"""Which frameworks are installed in the running environment, found without importing them."""

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
"""The oldest version of each framework that is supported."""

TITLES: Mapping[str, str] = MappingProxyType({"torch": "PyTorch", "tensorflow": "TensorFlow"})

_TENSORFLOW_DISTRIBUTIONS = ("tensorflow", "tensorflow-cpu", "tf-nightly", "tf-nightly-cpu", "tensorflow-rocm")


@dataclass(frozen=True)
class Framework:
    """An installed framework.

    Attributes:
        name: its import name, "torch" or "tensorflow".
        version: its full version, with the local part (2.13.0+cpu).
        cuda: whether it was built with CUDA.
        cxx: the oldest C++ standard that its headers compile with.
    """

    name: str
    version: str
    cuda: bool
    cxx: int = 17

    @property
    def title(self) -> str:
        """Its name as people write it."""
        return TITLES[self.name]

    @property
    def supported(self) -> bool:
        """Whether it is new enough."""
        return release(self.version) >= MINIMUM[self.name]


def release(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version, (0, 0) if it does not start with two."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


def detect() -> tuple[Framework, ...]:
    """Return the frameworks installed here, of whatever version, PyTorch first."""
    return tuple(found for found in (_torch(), _tensorflow()) if found is not None)


def supported(found: tuple[Framework, ...]) -> tuple[Framework, ...]:
    """Return those of `found` that are new enough.

    Raises:
        InstallError: there is none.
    """
    usable = tuple(framework for framework in found if framework.supported)
    if usable:
        return usable
    wanted = " or ".join(f"{TITLES[name]} >= {major}.{minor}" for name, (major, minor) in MINIMUM.items())
    if found:
        have = ", ".join(f"{framework.title} {framework.version}" for framework in found)
        cause = f"Horovod is built against {wanted}, and this environment has only {have}."
    else:
        cause = f"Horovod is built against {wanted}, and this environment has neither."
    raise InstallError(
        cause, "install the framework first, for instance with `pip install torch` or `pip install tensorflow`."
    )


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed package, None where there is none.

    A folder without `__init__.py`, such as `torch/` at the root of this project's checkout, imports as an empty
    namespace when the real package is absent; it has no origin, and does not count.
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
    # torch/version.py is written by PyTorch's build. Its version is fuller than the distribution's: with "+cu130".
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
