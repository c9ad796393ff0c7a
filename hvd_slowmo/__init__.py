"""hvd-slowmo: SlowMo (slow momentum, Wang et al., ICLR 2020) and its relatives for Horovod.

This package is the core and imports no framework. Users open the door of their framework:
`import hvd_slowmo.torch as slowmo` or `import hvd_slowmo.tf as slowmo`.
"""

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.gossip import DPSGD, SGP
from hvd_slowmo.version import __version__
from hvd_slowmo.wire.parameter_map import ParameterMap

__all__ = ["DPSGD", "SGP", "ParameterMap", "SlowMoConfig", "__version__"]
