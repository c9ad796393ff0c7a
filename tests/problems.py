"""One list of trainings that every adapter runs, and the reference beside it.

A problem is a few parameters in float64 and a gradient per worker and step, written in NumPy: an adapter's test puts
the gradient into its framework's parameters and compares the parameters after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hvd_slowmo import reference

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
    """A training: the settings of SlowMoConfig, the base optimizer, rates and the number of steps."""

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
        """Whether PyTorch and Keras define the same update for it.

        Keras has no parameter groups, and its momentum is in units of the rates of the time, PyTorch's of the present.
        """
        momentum_alike = not self.options.get("momentum") or self.schedule == "constant"
        return len(set(self.groups)) == 1 and momentum_alike

    def start(self) -> np.ndarray:
        return np.random.default_rng(self.seed).normal(size=DIMENSIONS)

    def gradient(self, worker: int, step: int, x: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, worker, 7])
        scale, centre = rng.uniform(0.5, 1.5, DIMENSIONS), rng.normal(size=DIMENSIONS)
        return scale * (x - centre) + 0.3 * np.sin(x + step + worker)

    def reference(self, workers: int) -> list[reference.Snapshot]:
        return reference.run(
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


def distance(histories: list[list[dict[str, Any]]], problem: Problem) -> float:
    """The largest difference between the workers' parameters and the reference's, over all steps."""
    expected = problem.reference(len(histories))
    return max(
        float(np.abs(history[step]["x"] - snapshot.x[rank]).max())
        for rank, history in enumerate(histories)
        for step, snapshot in enumerate(expected)
    )


def pieces(x: np.ndarray) -> list[np.ndarray]:
    """The flat vector as the parameters' arrays."""
    return [part.reshape(shape) for part, shape in zip(np.split(x, np.cumsum(SIZES)[:-1]), SHAPES, strict=True)]


NESTEROV = {"momentum": 0.875, "nesterov": True}
# Where both frameworks define the same update: Keras takes the constants as float32, so they are sums of few powers of
# two, and adds eps before the correction of the bias, PyTorch behind it, so it is too small to matter.
ADAM = {"betas": (0.875, 0.9921875), "eps": 2.0**-70}
ADAMW = {**ADAM, "weight_decay": 2.0**-7}
LOCAL_SGD = {"alpha": 1.0, "beta": 0.0}

PROBLEMS: dict[str, Problem] = {
    "slowmo over plain SGD": Problem({"tau": 3}),
    "slowmo over Nesterov SGD, reset": Problem({"tau": 4, "buffers": "reset"}, options=NESTEROV, schedule="decay"),
    "slowmo over momentum SGD, average": Problem({"tau": 4, "buffers": "average"}, options={"momentum": 0.875}),
    "slowmo over Adam": Problem({"tau": 5, "beta": 0.7}, base="adam", options=ADAM, schedule="steps"),
    "slowmo over Adam, average": Problem({"tau": 3, "buffers": "average"}, base="adam", options=ADAM),
    "slowmo over AdamW, reset": Problem({"tau": 3, "alpha": 0.8, "buffers": "reset"}, base="adamw", options=ADAMW),
    "two groups, restarting rates": Problem({"tau": 4, "alpha": 0.9}, schedule="restarts", groups=(0, 0, 1, 1)),
    "rates of zero": Problem({"tau": 4, "nesterov": True}, schedule="zero", groups=(0, 1, 1, 1), steps=21),
    "unscaled, Nesterov": Problem({"tau": 2, "scale_by_lr": False, "nesterov": True}, schedule="decay"),
    "warm-up": Problem({"tau": 3, "warmup_steps": 4, "buffers": "reset"}, options=NESTEROV),
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
    "slowmo over Nesterov SGD, reset, constant": Problem({"tau": 4, "buffers": "reset"}, options=NESTEROV),
    "ar_sgd, plain": Problem({"tau": None, **LOCAL_SGD, "gradients": "all"}, schedule="decay"),
    "ar_sgd": Problem({"tau": None, **LOCAL_SGD, "gradients": "all"}, options=NESTEROV, schedule="decay"),
}
