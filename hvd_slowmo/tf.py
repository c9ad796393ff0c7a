"""The Keras door: `import hvd_slowmo.tf as slowmo`."""

import keras

if keras.config.backend() != "tensorflow":
    raise ImportError(
        f"hvd_slowmo.tf needs Keras on TensorFlow, and Keras runs on {keras.config.backend()!r} here. Set "
        "KERAS_BACKEND=tensorflow before Keras is imported, or use hvd_slowmo.torch for a PyTorch model."
    )

from hvd_slowmo.checkpoint.periodic import Checkpoints
from hvd_slowmo.checkpoint.preemption import on_preemption
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.regroup.join import JoinResult, join
from hvd_slowmo.core.step.metrics import Metrics
from hvd_slowmo.core.step.preemption import PREEMPTED
from hvd_slowmo.gossip import DPSGD, SGP
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf import elastic
from hvd_slowmo_tf.fit.callback import SlowMoCallback
from hvd_slowmo_tf.horovod import workers
from hvd_slowmo_tf.metric_mean import mean
from hvd_slowmo_tf.optimizer import SlowMo
from hvd_slowmo_tf.recompute import recompute_statistics
from hvd_slowmo_tf.steps import measure

init = workers.init

__all__ = [
    "DPSGD",
    "PREEMPTED",
    "SGP",
    "Checkpoints",
    "JoinResult",
    "Metrics",
    "ParameterMap",
    "SlowMo",
    "SlowMoCallback",
    "SlowMoConfig",
    "elastic",
    "init",
    "join",
    "mean",
    "measure",
    "on_preemption",
    "recompute_statistics",
]
