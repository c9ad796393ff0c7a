"""The PyTorch door: `import hvd_slowmo.torch as slowmo`."""

from hvd_slowmo.checkpoint.periodic import Checkpoints
from hvd_slowmo.checkpoint.preemption import on_preemption
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.regroup.join import JoinResult, join
from hvd_slowmo.core.step.metrics import Metrics
from hvd_slowmo.core.step.preemption import PREEMPTED
from hvd_slowmo.gossip import DPSGD, SGP
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_torch import elastic
from hvd_slowmo_torch.advice.steps import measure
from hvd_slowmo_torch.comm.workers import init, local_rank, rank, size
from hvd_slowmo_torch.metric_mean import mean
from hvd_slowmo_torch.optimizer import SlowMo
from hvd_slowmo_torch.recompute import recompute_statistics
from hvd_slowmo_torch.simulator.simulation import Simulation
from hvd_slowmo_torch.simulator.task import SimulationTask

__all__ = [
    "DPSGD",
    "PREEMPTED",
    "SGP",
    "Checkpoints",
    "JoinResult",
    "Metrics",
    "ParameterMap",
    "Simulation",
    "SimulationTask",
    "SlowMo",
    "SlowMoConfig",
    "elastic",
    "init",
    "join",
    "local_rank",
    "mean",
    "measure",
    "on_preemption",
    "rank",
    "recompute_statistics",
    "size",
]
