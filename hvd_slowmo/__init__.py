"""hvd-slowmo: SlowMo (slow momentum, Wang et al., ICLR 2020) and its relatives for Horovod.

This package is the core and imports no framework. Users open a door of their framework:
`import hvd_slowmo.torch as slowmo`.
"""

from typing import TYPE_CHECKING, Any

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.version import __version__

if TYPE_CHECKING:
    from hvd_slowmo.wire.parameter_map import ParameterMap

__all__ = ["ParameterMap", "SlowMoConfig", "__version__"]


def __getattr__(name: str) -> Any:
    """ParameterMap, at first use: it needs NumPy, and `hvd-slowmo doctor` must run without it."""
    if name == "ParameterMap":
        from hvd_slowmo.wire.parameter_map import ParameterMap

        return ParameterMap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
