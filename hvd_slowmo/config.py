"""What a user can set: one frozen dataclass, its checks, and the field's named methods as presets."""

from __future__ import annotations

import math
import operator
import warnings
from dataclasses import dataclass, fields
from typing import Any

BUFFERS = ("maintain", "reset", "average")
GRADIENTS = ("local", "node", "all")
NONFINITE = ("raise", "exclude")
BASES = ("local", "sgp", "dpsgd")
TOPOLOGIES = ("exponential", "bipartite", "complete", "ring", "full", "star")
"""The names in `hvd_slowmo.topology.graphs`, which needs NumPy; settings do without."""
_FUNCTION = "function "


@dataclass(frozen=True, kw_only=True)
class SlowMoConfig:
    """Settings of SlowMo (Wang et al., ICLR 2020, arXiv 1910.00643, Algorithm 1) and of its relatives.

    Args:
        tau: inner steps per outer step, an integer >= 1 (the paper: 12 for Local SGD). None: no outer step at all.
        alpha: slow learning rate, > 0 (the paper: 1).
        beta: slow momentum, in [0, 1) (the paper: 0.4 to 0.8).
        nesterov: Nesterov form of the outer step (BMUF, DiLoCo); Algorithm 1 itself has none.
        scale_by_lr: carry the momentum in units of the base optimizer's rate, as Algorithm 1 does (line 7 divides by
            gamma). False: heavy-ball momentum on the outer gradient, whatever the rate does (BMUF, DiLoCo).
        buffers: what happens to the base optimizer's buffers when a block begins (Algorithm 1, line 2): "maintain",
            "reset" (as before the first step) or "average" (over the workers).
        base: what happens to parameters between outer steps: "local" (nothing), "sgp" (stochastic gradient push) or
            "dpsgd": workers mix theirs with some others' after every step (gossip).
        topology: over a gossip base, who sends to whom: a name (see `hvd_slowmo.topology`), an array (period, m, m) or
            (m, m), or a function of m that returns one. None: "exponential" for SGP; for D-PSGD "bipartite", or "ring"
            where m is odd. With gradients="node" m is the number of nodes.
        overlap: over "sgp": what is sent at a step is mixed one step later, while computation goes on (OSGP).
        average: False, over a gossip base: each worker takes outer steps of its own, from its own parameters
            (noaverage).
        gradients: over whom gradients are averaged at every step: "local" (nobody), "node" (the workers of one machine;
            the paper's workers are such nodes) or "all" (every worker: AR-SGD).
        warmup_steps: so many first steps average the gradients of all workers and take no outer step. The first block
            begins after them.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of its range; the message says what was received.

    Warns:
        UserWarning: a setting that can have no effect beside the others.
    """

    tau: int | None = 12
    alpha: float = 1.0
    beta: float = 0.5
    nesterov: bool = False
    scale_by_lr: bool = True
    buffers: str = "maintain"
    base: str = "local"
    topology: Any = None
    overlap: bool = False
    average: bool = True
    gradients: str = "local"
    warmup_steps: int = 0
    nonfinite: str = "raise"

    def __post_init__(self) -> None:
        if self.tau is not None:
            self._set("tau", _integer("tau", self.tau, 1, "a positive integer or None"))
        self._set("alpha", _real("alpha", self.alpha, lambda a: a > 0, "a finite number > 0"))
        self._set("beta", _real("beta", self.beta, lambda b: 0 <= b < 1, "a number in [0, 1)"))
        for name in ("nesterov", "scale_by_lr", "overlap", "average"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False. Received: {name}={getattr(self, name)!r}")
        _one_of("buffers", self.buffers, BUFFERS)
        _one_of("base", self.base, BASES)
        _one_of("gradients", self.gradients, GRADIENTS)
        _one_of("nonfinite", self.nonfinite, NONFINITE)
        self._set("warmup_steps", _integer("warmup_steps", self.warmup_steps, 0, "an integer >= 0"))
        self._check_gossip()
        for complaint in self._without_effect():
            warnings.warn(complaint, UserWarning, stacklevel=3)

    def _check_gossip(self) -> None:
        """Refuse what can't work over this base."""
        if isinstance(self.topology, str):
            _known(self.topology)
        elif not (self.topology is None or callable(self.topology)):
            self._set("topology", _plain(self.topology))  # settings are compared and stored
        if self.base == "local":
            given = {"topology": self.topology is not None, "overlap": self.overlap, "average": not self.average}
            for name in (name for name, set_ in given.items() if set_):
                raise ValueError(
                    f"`{name}` is for a gossip base. Received: base='local', {name}={getattr(self, name)!r}. "
                    "Use base='sgp' or base='dpsgd'."
                )
            return
        if self.overlap and self.base == "dpsgd":
            raise ValueError("`overlap` is for base='sgp' (OSGP): what is late has a weight there, and not in D-PSGD.")
        if self.gradients == "all":
            raise ValueError(
                "gradients='all' keeps all workers equal, and there is nothing to gossip. Received: "
                f"base={self.base!r}. Use base='local', or gradients='node' for gossip between nodes."
            )
        if self.nonfinite == "exclude":
            raise ValueError(
                f"nonfinite='exclude' can't work over base={self.base!r}: what is not finite has travelled by the time "
                "the workers meet. Use nonfinite='raise'."
            )
        if not self.average and self.buffers == "average":
            raise ValueError("average=False exchanges nothing when a block begins: use buffers='maintain' or 'reset'.")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen; this stores the normalised value

    def _without_effect(self) -> list[str]:
        if self.tau is None:
            neutral = {"alpha": 1.0, "beta": 0.0}
            idle = [
                f"{f.name}={getattr(self, f.name)!r}"
                for f in fields(self)
                if f.name in ("alpha", "beta", "nesterov", "scale_by_lr", "buffers", "average")
                and getattr(self, f.name) not in (f.default, neutral.get(f.name, f.default))
            ]
            if self.gradients == "all" and self.warmup_steps:
                idle.append(f"warmup_steps={self.warmup_steps}")
            found = [f"tau=None takes no outer step, so {', '.join(idle)} has no effect."] if idle else []
            if self.gradients != "all" and self.base == "local":
                among = "workers" if self.gradients == "local" else "nodes"
                found.append(f"tau=None with gradients={self.gradients!r}: after the warm-up the {among} never meet.")
            return found
        idle = []
        if self.beta == 0:
            idle += ["nesterov=True"] if self.nesterov else []
            idle += ["scale_by_lr=False"] if not self.scale_by_lr else []
        return [f"beta=0 carries no momentum, so {' and '.join(idle)} has no effect."] if idle else []

    @property
    def vectors(self) -> tuple[str, ...]:
        """The vectors that the outer step keeps beside the model: Local SGD needs none, beta = 0 only the anchor."""
        if self.tau is None or (self.alpha == 1 and self.beta == 0):
            return ()
        return ("anchor",) if self.beta == 0 else ("anchor", "v")

    def facts(self) -> dict[str, Any]:
        """All settings as plain values, for comparing and storing; a topology that is a function by its name only."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        if callable(self.topology):
            found["topology"] = f"{_FUNCTION}{getattr(self.topology, '__qualname__', type(self.topology).__name__)}"
        return found

    # Presets: the table "special cases" of docs/algorithm.md. Each takes any further setting by keyword.

    @classmethod
    def local_sgd(cls, tau: int, **settings: Any) -> SlowMoConfig:
        """Local SGD (Stich 2019): the plain mean of the parameters every tau steps."""
        return cls(**{"tau": tau, "alpha": 1.0, "beta": 0.0, **settings})

    @classmethod
    def bmuf(
        cls, tau: int, block_lr: float = 1.0, block_momentum: float = 0.5, nesterov: bool = False, **settings: Any
    ) -> SlowMoConfig:
        """Blockwise model-update filtering (Chen and Huo 2016), classical or Nesterov."""
        momentum = {"nesterov": nesterov, "scale_by_lr": block_momentum == 0}
        return cls(**{"tau": tau, "alpha": block_lr, "beta": block_momentum, **momentum, **settings})

    @classmethod
    def lookahead(cls, tau: int, alpha: float = 0.5, **settings: Any) -> SlowMoConfig:
        """Lookahead (Zhang et al. 2019): a step of length alpha towards the fast weights; usually on one worker."""
        return cls(**{"tau": tau, "alpha": alpha, "beta": 0.0, **settings})

    @classmethod
    def diloco(cls, tau: int, **settings: Any) -> SlowMoConfig:
        """DiLoCo (Douillard et al. 2023): outer Nesterov SGD(0.7, momentum 0.9) over AdamW, whose state is kept."""
        paper = {"alpha": 0.7, "beta": 0.9, "nesterov": True, "scale_by_lr": False, "buffers": "maintain"}
        return cls(**{"tau": tau, **paper, **settings})

    @classmethod
    def sgp(cls, **settings: Any) -> SlowMoConfig:
        """Stochastic gradient push (Assran et al. 2019) alone; with tau=... below SlowMo."""
        return cls(**{"base": "sgp", **cls._alone(settings), **settings})

    @classmethod
    def osgp(cls, **settings: Any) -> SlowMoConfig:
        """SGP that overlaps communication with computation: what is sent arrives one step later."""
        return cls(**{"base": "sgp", "overlap": True, **cls._alone(settings), **settings})

    @classmethod
    def dpsgd(cls, **settings: Any) -> SlowMoConfig:
        """Decentralized parallel SGD (Lian et al. 2017) alone; with tau=... below SlowMo."""
        return cls(**{"base": "dpsgd", **cls._alone(settings), **settings})

    @staticmethod
    def _alone(settings: dict[str, Any]) -> dict[str, Any]:
        return {} if settings.get("tau") is not None else {"tau": None, "alpha": 1.0, "beta": 0.0}

    @classmethod
    def ar_sgd(cls, **settings: Any) -> SlowMoConfig:
        """AR-SGD: gradients averaged over all workers at every step, no outer step."""
        return cls(**{"tau": None, "alpha": 1.0, "beta": 0.0, "gradients": "all", **settings})


def _known(name: str) -> None:
    """Refuse what is no topology's name."""
    if name.startswith(_FUNCTION):
        raise ValueError(
            f"these settings were stored with a topology that is a {name}, and only its name was. Make the config "
            "anew, with the function itself; in Keras load the model with compile=False and compile it again."
        )
    if name not in TOPOLOGIES:
        raise ValueError(
            f"`topology` must be one of {', '.join(map(repr, TOPOLOGIES))}, an array (period, m, m), or a function of "
            f"m. Received: topology={name!r}"
        )


def _plain(array: Any) -> tuple[Any, ...]:
    """An array as nested tuples of numbers."""
    values = array.tolist() if hasattr(array, "tolist") else array

    def nested(value: Any) -> Any:
        return tuple(map(nested, value)) if isinstance(value, (list, tuple)) else float(value)

    try:
        found = nested(values)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, tuple):
        raise TypeError(
            "`topology` must be None, a name, an array of numbers or a function of the number of workers. Received: "
            f"topology={array!r}"
        )
    return found


def _integer(name: str, value: Any, least: int, allowed: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be {allowed}. Received: {name}={value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be {allowed}. Received: {name}={value!r}")
    if number < least:
        raise ValueError(f"`{name}` must be {allowed}. Received: {name}={value!r}")
    return number


def _real(name: str, value: Any, valid: Any, allowed: str) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError(f"`{name}` must be {allowed}. Received: {name}={value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be {allowed}. Received: {name}={value!r}") from None
    if not (math.isfinite(number) and valid(number)):
        raise ValueError(f"`{name}` must be {allowed}. Received: {name}={value!r}")
    return number


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be one of {', '.join(map(repr, allowed))}. Received: {name}={value!r}")
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}. Received: {name}={value!r}")
