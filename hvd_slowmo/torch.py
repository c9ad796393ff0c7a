"""The PyTorch door: `import hvd_slowmo.torch as slowmo`."""

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo_torch.optimizer import SlowMo

__all__ = ["SlowMo", "SlowMoConfig"]
