"""The PyTorch door: `import hvd_slowmo.torch as slowmo`."""

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo_torch.nodes import init
from hvd_slowmo_torch.optimizer import SlowMo
from hvd_slowmo_torch.results import Joined, Metrics

__all__ = ["Joined", "Metrics", "SlowMo", "SlowMoConfig", "init"]
