"""The PyTorch door: `import hvd_slowmo.torch as slowmo`."""

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo_torch.nodes import init
from hvd_slowmo_torch.optimizer import Joined, Metrics, SlowMo

__all__ = ["Joined", "Metrics", "SlowMo", "SlowMoConfig", "init"]
