"""The list of problems that every adapter trains, with the reference.

A problem is a few parameters in float64 and a gradient per worker and step, written in NumPy: an adapter's test puts
the gradient into its framework's parameters and compares the parameters after every step.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hvd_slowmo import DPSGD, SGP, SlowMoConfig
from hvd_slowmo.core.parts.layout import CHUNK_BYTES
from hvd_slowmo.topology.checks import topology
from reference.gossip import GossipSnapshot, run_gossip
from reference.slowmo import Snapshot, run
from reference.streaming import StreamedSnapshot, run_streamed

SHAPES = ((3, 2), (4,), (), (2, 1, 2))
SIZES = tuple(int(np.prod(shape)) for shape in SHAPES)
DIMENSIONS = sum(SIZES)

SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "decay": lambda step: 0.9**step,
    "steps": lambda step: 0.1 if step >= 9 else 1.0,
    "restarts": lambda step: 0.5 * (1 + np.cos(np.pi * (step % 6) / 6)),
    "zero": lambda step: 0.0 if 4 <= step < 12 else 1.0,
}


@dataclass(frozen=True)
class Problem:
    """A training run: settings of SlowMoConfig, inner optimizer, rates and number of steps."""

    config: dict[str, Any]
    base: str = "sgd"
    options: dict[str, Any] = field(default_factory=dict)
    schedule: str = "constant"
    groups: tuple[int, ...] = (0, 0, 0, 0)  # the parameter group of each shape; in order
    steps: int = 14
    seed: int = 0

    def rate(self, step: int, group: int) -> float:
        return float((0.1, 0.04)[group] * SCHEDULES[self.schedule](step))

    @property
    def same_everywhere(self) -> bool:
        """Return True if PyTorch and Keras define the same update for it.

        Keras has no parameter groups, and its momentum contains the past learning rates; PyTorch's does not.
        """
        momentum_alike = not self.options.get("momentum") or self.schedule == "constant"
        return len(set(self.groups)) == 1 and momentum_alike

    def start(self) -> np.ndarray:
        return np.random.default_rng(self.seed).normal(size=DIMENSIONS)

    def gradient(self, worker: int, step: int, x: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, worker, 7])
        scale, centre = rng.uniform(0.5, 1.5, DIMENSIONS), rng.normal(size=DIMENSIONS)
        return scale * (x - centre) + 0.3 * np.sin(x + step + worker)

    def gossip_reference(
        self, workers: int, epochs: list[tuple[int, ...]] | None = None, nodes: list[list[int]] | None = None
    ) -> list[GossipSnapshot]:
        """Return the reference with gossip; the model is the snapshots' z."""
        config = dict(self.config)
        method, graph = config.pop("gossip"), config.pop("topology", None)
        return run_gossip(
            self.start(),
            self.gradient,
            topology=topology(graph, workers, symmetric=method == "dpsgd", nodes=nodes),
            lr=lambda worker, step, group: self.rate(step, group),
            steps=None if epochs else self.steps,
            epochs=epochs,
            gossip=method,
            nodes=nodes,
            base=self.base,
            base_options=self.options,
            groups=np.repeat(self.groups, SIZES),
            **config,
        )

    def streamed_reference(
        self, workers: int, chunk_bytes: int | None = None, epochs: list[tuple[int, ...]] | None = None
    ) -> list[StreamedSnapshot]:
        """Return the reference with fragments and a delay.

        Args:
            chunk_bytes: greatest length of a message, by which the parameters are dealt into fragments.
        """
        fragments = self.config.get("fragments", 1)
        longest = max(1, (chunk_bytes or CHUNK_BYTES) // 8)
        chunks = min(DIMENSIONS, fragments * -(-DIMENSIONS // (longest * fragments)))
        ends = [DIMENSIONS * (number + 1) // chunks for number in range(chunks)]
        chunk = np.searchsorted(ends, np.arange(DIMENSIONS), side="right")
        config = {key: value for key, value in self.config.items() if key != "shard"}  # the same algorithm
        return run_streamed(
            self.start(),
            self.gradient,
            workers=workers,
            lr=lambda worker, step, group: self.rate(step, group),
            fragment=chunk % fragments,
            steps=None if epochs else self.steps,
            epochs=epochs,
            base=self.base,
            base_options=self.options,
            groups=np.repeat(self.groups, SIZES),
            **config,
        )

    def reference(self, workers: int) -> list[Snapshot]:
        return run(
            self.start(),
            self.gradient,
            steps=self.steps,
            workers=workers,
            lr=lambda worker, step, group: self.rate(step, group),
            base=self.base,
            base_options=self.options,
            groups=np.repeat(self.groups, SIZES),
            **self.config,
        )


_lock = threading.Lock()
_inside = 0
_OPTIMIZERS = ("hvd_slowmo_torch.optimizer", "hvd_slowmo_tf.optimizer")


@contextlib.contextmanager
def chunks_of(size: int | None) -> Iterator[None]:
    """Make optimizers with messages of this many bytes. Threads share the setting; the last to leave restores it."""
    global _inside
    optimizers = [sys.modules[name].SlowMo for name in _OPTIMIZERS if name in sys.modules]
    with _lock:
        _inside += 1
        if size is not None:
            for optimizer in optimizers:
                optimizer._chunk_bytes = size
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for optimizer in optimizers:
                    optimizer._chunk_bytes = CHUNK_BYTES


def config_of(settings: dict[str, Any]) -> SlowMoConfig:
    """Return the configuration of a problem's settings, whose gossip is spelled as in the oracle."""
    settings = dict(settings)
    method = settings.pop("gossip", None)
    options = {key: settings.pop(key) for key in ("topology", "overlap") if key in settings}
    if method is None:
        assert not options, "these are settings of gossip"
        return SlowMoConfig(**settings)
    return SlowMoConfig(gossip={"sgp": SGP, "dpsgd": DPSGD}[method](**options), **settings)


def with_node(comm: Any, node: Any) -> Any:
    """Return a worker's Comm that knows the workers of its node."""
    comm.node = node
    return comm


def distance(histories: list[list[dict[str, Any]]], problem: Problem, chunk_bytes: int | None = None) -> float:
    """Return the largest difference between the workers' parameters and the reference's, over all steps."""
    workers = len(histories)
    models: Sequence[np.ndarray]
    if {"fragments", "delay"} & problem.config.keys():
        models = [snapshot.x for snapshot in problem.streamed_reference(workers, chunk_bytes)]
    elif "gossip" in problem.config:
        models = [snapshot.z for snapshot in problem.gossip_reference(workers)]
    else:
        models = [snapshot.x for snapshot in problem.reference(workers)]
    return max(
        float(np.abs(history[step]["x"] - model[rank]).max())
        for rank, history in enumerate(histories)
        for step, model in enumerate(models)
    )


def pieces(x: np.ndarray) -> list[np.ndarray]:
    """Split the flat vector into the parameters' arrays."""
    return [part.reshape(shape) for part, shape in zip(np.split(x, np.cumsum(SIZES)[:-1]), SHAPES, strict=True)]


NESTEROV = {"momentum": 0.875, "nesterov": True}
# Constants under which both frameworks define the same update. Keras rounds them to float32, so they are sums of few
# powers of two. Keras adds eps before the bias correction and PyTorch after it, so eps is too small to matter.
ADAM = {"betas": (0.875, 0.9921875), "eps": 2.0**-70}
ADAMW = {**ADAM, "weight_decay": 2.0**-7}
LOCAL_SGD = {"alpha": 1.0, "beta": 0.0}

PROBLEMS: dict[str, Problem] = {
    "slowmo over plain SGD": Problem({"tau": 3}),
    "slowmo over Nesterov SGD, reset": Problem({"tau": 4, "inner_state": "reset"}, options=NESTEROV, schedule="decay"),
    "slowmo over momentum SGD, average": Problem({"tau": 4, "inner_state": "average"}, options={"momentum": 0.875}),
    "slowmo over Adam": Problem({"tau": 5, "beta": 0.7}, base="adam", options=ADAM, schedule="steps"),
    "slowmo over Adam, average": Problem({"tau": 3, "inner_state": "average"}, base="adam", options=ADAM),
    "slowmo over AdamW, reset": Problem({"tau": 3, "alpha": 0.8, "inner_state": "reset"}, base="adamw", options=ADAMW),
    "two groups, restarting rates": Problem({"tau": 4, "alpha": 0.9}, schedule="restarts", groups=(0, 0, 1, 1)),
    "rates of zero": Problem({"tau": 4, "nesterov": True}, schedule="zero", groups=(0, 1, 1, 1), steps=21),
    "unscaled, Nesterov": Problem({"tau": 2, "scale_by_lr": False, "nesterov": True}, schedule="decay"),
    "warm-up": Problem({"tau": 3, "warmup_steps": 4, "inner_state": "reset"}, options=NESTEROV),
    "gradients averaged, Lookahead on top": Problem({"tau": 3, "gradients": "all", "alpha": 0.5, "beta": 0.0}),
    "local_sgd": Problem({"tau": 4, **LOCAL_SGD}, options=NESTEROV),
    "lookahead": Problem({"tau": 4, "alpha": 0.5, "beta": 0.0}, base="adam", options=ADAM),
    "bmuf": Problem({"tau": 3, "alpha": 0.9, "beta": 0.6, "scale_by_lr": False}, schedule="steps"),
    "diloco": Problem(
        {"tau": 5, "alpha": 0.7, "beta": 0.9, "nesterov": True, "scale_by_lr": False},
        base="adamw",
        options=ADAMW,
        steps=22,
    ),
    "momentum SGD, maintained": Problem({"tau": 4}, options={"momentum": 0.875}),
    "slowmo over Nesterov SGD, reset, constant": Problem({"tau": 4, "inner_state": "reset"}, options=NESTEROV),
    "ar_sgd, plain": Problem({"tau": None, **LOCAL_SGD, "gradients": "all"}, schedule="decay"),
    "ar_sgd": Problem({"tau": None, **LOCAL_SGD, "gradients": "all"}, options=NESTEROV, schedule="decay"),
}

STREAMED: dict[str, Problem] = {
    "three fragments": Problem({"tau": 5, "fragments": 3}, options=NESTEROV, schedule="decay"),
    "three fragments, constant": Problem({"tau": 5, "fragments": 3, "beta": 0.7}, options=NESTEROV),
    "a fragment per step": Problem({"tau": 4, "fragments": 4, "alpha": 0.8}),
    "one step late": Problem({"tau": 4, "delay": 1}, options=NESTEROV, schedule="decay"),
    "one step late, plain SGD, warm-up": Problem({"tau": 4, "delay": 1, "warmup_steps": 2}),
    "a block late": Problem({"tau": 3, "delay": 3, "nesterov": True, "scale_by_lr": False}),
    "streaming": Problem({"tau": 4, "fragments": 4, "delay": 1}, schedule="restarts", groups=(0, 0, 1, 1), steps=18),
    "streaming, two steps late, warm-up": Problem({"tau": 5, "fragments": 5, "delay": 2, "warmup_steps": 3}),
    "streaming, a block late": Problem({"tau": 3, "fragments": 3, "delay": 3}, base="adam", options=ADAM),
    "streaming Local SGD": Problem({"tau": 4, "fragments": 2, "delay": 1, **LOCAL_SGD}),
    "streaming DiLoCo": Problem(
        {"tau": 6, "fragments": 3, "delay": 1, "alpha": 0.7, "beta": 0.9, "nesterov": True, "scale_by_lr": False},
        base="adamw",
        options=ADAMW,
        steps=22,
    ),
    "streaming with averaged gradients": Problem({"tau": 4, "fragments": 2, "delay": 2, "gradients": "all"}),
}
"""Outer steps in fragments, and late."""

ALONE: dict[str, Any] = {"tau": None, **LOCAL_SGD}
GOSSIP: dict[str, Problem] = {
    "sgp": Problem({"gossip": "sgp", **ALONE}, schedule="decay"),
    "sgp, star": Problem({"gossip": "sgp", "topology": "star", **ALONE}),
    "osgp": Problem({"gossip": "sgp", "overlap": True, **ALONE}),
    "osgp, star, warm-up": Problem({"gossip": "sgp", "overlap": True, "topology": "star", "warmup_steps": 3, **ALONE}),
    "sgp, ring, beyond a check": Problem({"gossip": "sgp", "topology": "ring", **ALONE}, steps=66),
    "dpsgd": Problem({"gossip": "dpsgd", **ALONE}, schedule="steps"),
    "dpsgd over Adam": Problem({"gossip": "dpsgd", **ALONE}, base="adam", options=ADAM),
    "sgp, complete, slowmo": Problem({"gossip": "sgp", "topology": "complete", "tau": 4}, schedule="decay"),
    "sgp, star, slowmo": Problem({"gossip": "sgp", "topology": "star", "tau": 4, "alpha": 0.9}, schedule="decay"),
    "osgp, slowmo": Problem({"gossip": "sgp", "overlap": True, "tau": 5, "inner_state": "reset"}, options=NESTEROV),
    "osgp, star, slowmo, Adam": Problem(
        {"gossip": "sgp", "overlap": True, "topology": "star", "tau": 3, "beta": 0.7}, base="adam", options=ADAM
    ),
    "osgp, slowmo, warm-up, average": Problem(
        {"gossip": "sgp", "overlap": True, "tau": 4, "warmup_steps": 2, "inner_state": "average"},
        options={"momentum": 0.875},
    ),
    "dpsgd, slowmo": Problem({"gossip": "dpsgd", "topology": "ring", "tau": 3}, schedule="restarts"),
    "sgp, slowmo, noaverage": Problem({"gossip": "sgp", "average": False, "tau": 4}, schedule="decay"),
    "sgp, star, slowmo, noaverage": Problem(
        {"gossip": "sgp", "topology": "star", "average": False, "tau": 3, "nesterov": True, "scale_by_lr": False}
    ),
    "osgp, star, slowmo, noaverage": Problem(
        {"gossip": "sgp", "overlap": True, "topology": "star", "average": False, "tau": 4, "inner_state": "reset"},
        options=NESTEROV,
    ),
    "local steps between": Problem({"gossip": "sgp", "overlap": True, "tau": 1}),
}
