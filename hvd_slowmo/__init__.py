"""hvd-slowmo: SlowMo (slow momentum, Wang et al., ICLR 2020) and its relatives for Horovod.

This package is the core and imports no framework. Users open a door of their framework:
`import hvd_slowmo.torch as slowmo`.
"""

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.version import __version__

__all__ = ["SlowMoConfig", "__version__"]
