"""Settings: one frozen dataclass and its checks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from hvd_slowmo.checked_numbers import flag, integer, number_or_nan, one_of, real, spell_value
from hvd_slowmo.gossip import DPSGD, METHODS, SGP, Gossip
from hvd_slowmo.keywords import refuse_unknown
from hvd_slowmo.presets import Presets
from hvd_slowmo.settings import OTHER_NAMES, Bits, Gradients, InnerState, Nonfinite, SlowMoSettings, SlowState

_OWN_CHOICE = ("slow_state",)  # settings in which workers may differ


@dataclass(frozen=True, kw_only=True)
class SlowMoConfig(Presets):
    """Settings of SlowMo (Wang et al., ICLR 2020, arXiv 1910.00643, Algorithm 1) and of its relatives.

    Args:
        tau: inner steps per outer step, an integer >= 1 (the paper: 12 for Local SGD). None: no outer step at all.
        alpha: slow learning rate, > 0 (the paper: 1).
        beta: slow momentum, in [0, 1) (the paper: 0.4 to 0.8).
        nesterov: Nesterov form of the outer step (BMUF, DiLoCo); Algorithm 1 itself has none.
        scale_by_lr: carry the momentum in units of the inner learning rate, as Algorithm 1 does (line 7 divides by
            gamma). False: heavy-ball momentum on the outer gradient, whatever the rate does (BMUF, DiLoCo).
        inner_state: treatment of the inner optimizer's state when a block begins (Algorithm 1, line 2): "maintain",
            "reset" (as before the first step) or "average" (over the workers).
        gossip: mixing of parameters between outer steps: None (Local SGD), `SGP(...)` or `DPSGD(...)`.
        average: average the parameters at every outer step (Algorithm 1, line 6). False, with gossip only: each worker
            takes the outer step from its own parameters (noaverage).
        gradients: average gradients at every step over nobody ("local"), over the workers of one machine ("node"; the
            paper's workers are such nodes) or over all workers ("all": AR-SGD).
        warmup_steps: number of first steps, >= 0, that average the gradients of all workers and take no outer step.
            The first block begins after them.
        nonfinite: reaction to parameters that are not finite on some worker: "raise" a ValueError on every worker, or
            "exclude" that worker from the average; it then takes the others' result.
        fragments: number of parts, 1 .. tau, into which the parameters are dealt. Each part is exchanged once per tau
            steps, at a step of its own, so that the peak of the traffic falls by this factor (Streaming DiLoCo,
            Douillard et al. 2025, arXiv 2501.18512).
        delay: number of steps, 0 .. tau, that an exchange may take, beside the training. Its result is applied exactly
            that many steps late, and the steps trained meanwhile are kept.
        bits: precision in which the workers exchange their outer gradients: 32, 16 (bfloat16), 8 or 4. Below 32 each
            worker keeps the error of its own rounding, and adds it to its next outer gradient (error feedback;
            Karimireddy et al. 2019, arXiv 1901.09847). Biases, norms and statistics travel whole.
        shard: each worker keeps the slow momentum, and with 32 bits the anchor too, of its own slice of the parameters
            alone, and takes the outer step there for all (as ZeRO does with an optimizer's state; Rajbhandari et al.
            2020, arXiv 1910.02054).
        slow_state: place of anchor, slow momentum and residuals: the parameters' "device", or "host" memory, from which
            they are copied for the outer step, one message at a time.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of its range; the message says what was received.

    Warns:
        UserWarning: a setting that can have no effect beside the others.

    Example:
        >>> config = SlowMoConfig(tau=12, beta=0.5, inner_state="reset", warmup_steps=100)
        >>> config.vectors
        ('anchor', 'v')
    """

    tau: int | None = 12
    alpha: float = 1.0
    beta: float = 0.5
    nesterov: bool = False
    scale_by_lr: bool = True
    inner_state: InnerState = "maintain"
    gossip: Gossip | None = None
    average: bool = True
    gradients: Gradients = "local"
    warmup_steps: int = 0
    nonfinite: Nonfinite = "raise"
    fragments: int = 1
    delay: int = 0
    bits: Bits = 32
    shard: bool = False
    slow_state: SlowState = "device"

    def __new__(cls, *_: Any, **settings: Any) -> SlowMoConfig:
        """Refuse an unknown setting; one that other libraries know by another name is told its name here."""
        refuse_unknown("SlowMoConfig", settings, SlowMoSettings.__annotations__, OTHER_NAMES)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.tau is not None:
            self._set("tau", integer("tau", self.tau, 1, "a positive integer or None"))
        self._set("alpha", real("alpha", self.alpha, lambda a: a > 0, "a finite number > 0"))
        self._set("beta", real("beta", self.beta, lambda b: 0 <= b < 1, "a number in [0, 1)"))
        for name in ("nesterov", "scale_by_lr", "average", "shard"):
            flag(name, getattr(self, name))
        one_of("inner_state", self.inner_state, get_args(InnerState))
        one_of("gradients", self.gradients, get_args(Gradients))
        one_of("nonfinite", self.nonfinite, get_args(Nonfinite))
        one_of("slow_state", self.slow_state, get_args(SlowState))
        self._set("warmup_steps", integer("warmup_steps", self.warmup_steps, 0, "an integer >= 0"))
        self._set("fragments", integer("fragments", self.fragments, 1, "an integer from 1 to tau"))
        self._set("delay", integer("delay", self.delay, 0, "an integer from 0 to tau"))
        if isinstance(self.bits, bool) or number_or_nan(self.bits) not in get_args(Bits):
            raise ValueError(f"`bits` must be 32, 16, 8 or 4. Received: bits={spell_value(self.bits)}")
        self._set("bits", int(self.bits))
        self._check_gossip()
        self._check_streaming()
        for warning in self._without_effect():
            warnings.warn(warning, UserWarning, stacklevel=3)

    def _check_gossip(self) -> None:
        """Refuse settings that can't work with the gossip method, or without one."""
        if self.gossip is None:
            if not self.average:
                raise ValueError(
                    "`average=False` needs gossip between the outer steps. Received: gossip=None, average=False. "
                    "Use gossip=SGP() or gossip=DPSGD()."
                )
            return
        if not isinstance(self.gossip, (SGP, DPSGD)):
            raise TypeError(
                f"`gossip` must be None, SGP(...) or DPSGD(...). Received: gossip={spell_value(self.gossip)}"
            )
        if self.gradients == "all":
            raise ValueError(
                "gradients='all' keeps all workers equal, which leaves nothing to gossip. Received: "
                f"gossip={self.gossip!r}. Use gossip=None, or gradients='node' for gossip between nodes."
            )
        if self.nonfinite == "exclude":
            raise ValueError(
                f"nonfinite='exclude' can't work with gossip={self.gossip!r}: values that are not finite have "
                "travelled by the time the workers meet. Use nonfinite='raise'."
            )
        if not self.average and self.inner_state == "average":
            raise ValueError(
                "average=False exchanges nothing when a block begins: use inner_state='maintain' or 'reset'."
            )

    def _check_streaming(self) -> None:
        """Refuse fragments and delays that can't work with the other settings."""
        received = f"fragments={self.fragments}, delay={self.delay}"
        if self.tau is not None and max(self.fragments, self.delay) > self.tau:
            raise ValueError(f"`fragments` and `delay` can't be greater than tau={self.tau}. Received: {received}")
        if not self.streams and self.bits == 32 and not self.shard:
            return
        if self.gossip is not None:
            received += f", bits={self.bits}, shard={self.shard}"
            raise ValueError(
                "fragments > 1, delay > 0, bits < 32 or shard=True can't work with gossip: workers that mix have no "
                f"block of their own between two averages. Received: {received}, gossip={self.gossip!r}. Use "
                "gossip=None."
            )
        if self.shards and self.bits == 32 and self.fragments > 1 and self.nonfinite == "exclude":
            raise ValueError(
                "an excluded worker returns to the anchors of all fragments, and with shard=True no worker has them: "
                f"use bits=16 or fewer, one fragment, or nonfinite='raise'. Received: {received}, bits=32, shard=True."
            )
        if self.inner_state == "reset" and self.streams:
            raise ValueError(
                "inner_state='reset' needs fragments=1 and delay=0: the inner state belongs to all parameters and "
                f"steps at once. Received: {received}. Use inner_state='maintain' or 'average'."
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen; this stores the normalised value

    def _without_effect(self) -> list[str]:
        if self.tau is None:
            neutral = {"alpha": 1.0, "beta": 0.0}
            others = {"tau", "gossip", "gradients", "warmup_steps", "nonfinite"}
            unused = [
                f"{f.name}={getattr(self, f.name)!r}"
                for f in fields(self)
                if f.name not in others and getattr(self, f.name) not in (f.default, neutral.get(f.name, f.default))
            ]
            if self.gradients == "all" and self.warmup_steps:
                unused.append(f"warmup_steps={self.warmup_steps}")
            found = [f"tau=None takes no outer step, so {', '.join(unused)} has no effect."] if unused else []
            if self.gradients != "all" and self.gossip is None:
                among = "workers" if self.gradients == "local" else "nodes"
                found.append(f"tau=None with gradients={self.gradients!r}: after the warm-up the {among} never meet.")
            return found
        unused = []
        if self.beta == 0:
            unused += ["nesterov=True"] if self.nesterov else []
            unused += ["scale_by_lr=False"] if not self.scale_by_lr else []
        found = [f"beta=0 carries no momentum, so {' and '.join(unused)} has no effect."] if unused else []
        if self.slow_state == "host" and not self.vectors:
            found.append("there is no outer state, so slow_state='host' has no effect.")
        if self.shard and not self.shards:
            found.append("there is nothing to divide among the workers, so shard=True has no effect.")
        return found

    @property
    def shards(self) -> bool:
        """True if workers keep slices of the anchor or of the slow momentum."""
        if not self.shard or self.tau is None:
            return False
        return self.beta > 0 or (self.bits == 32 and self.alpha != 1)

    @property
    def resets_inner_state(self) -> bool:
        """True if the inner state may return to its first values: in each block, or on a worker that is left out."""
        return self.nonfinite == "exclude" or (self.inner_state == "reset" and self.tau is not None)

    @property
    def streams(self) -> bool:
        """True if an outer step is taken in parts, or late."""
        return self.fragments > 1 or self.delay > 0

    @property
    def vectors(self) -> tuple[Literal["anchor", "v", "residual"], ...]:
        """Names of the vectors that the outer step keeps beside the model.

        Local SGD needs none, beta = 0 only the anchor; few bits the anchor and the residual.
        """
        if self.tau is None:
            return ()
        if self.bits < 32:
            return ("anchor", "residual") if self.beta == 0 else ("anchor", "v", "residual")
        if self.alpha == 1 and self.beta == 0:
            # An excluded worker returns to the anchors of all fragments.
            return ("anchor",) if self.fragments > 1 and self.nonfinite == "exclude" else ()
        return ("anchor",) if self.beta == 0 else ("anchor", "v")

    @property
    def sliced_vectors(self) -> tuple[str, ...]:
        """Names of the vectors of which each worker keeps its own slice alone, of what travels in slices."""
        if self.tau is None:
            return ()
        if not self.shards:
            return ("slice_residual",) if self.bits < 32 else ()
        if self.bits == 32:
            return ("anchor",) if self.beta == 0 else ("anchor", "v")
        return ("v", "slice_residual")

    def facts(self) -> dict[str, Any]:
        """Return all settings in JSON types, for comparing and storing; a topology function by its name only.

        Example:
            >>> SlowMoConfig.sgp().facts()["gossip"]
            {'method': 'sgp', 'topology': None, 'overlap': False}
        """
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.gossip is not None:
            found["gossip"] = self.gossip.facts()
        return found

    def common_facts(self) -> dict[str, Any]:
        """Return the `facts()` that workers, and a checkpoint and those who load it, must have in common.

        Example:
            >>> SlowMoConfig(slow_state="host").common_facts() == SlowMoConfig().common_facts()
            True
        """
        return {name: value for name, value in self.facts().items() if name not in _OWN_CHOICE}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> SlowMoConfig:
        """Return the configuration with these `facts()`.

        Raises:
            ValueError: the facts are of a topology function, of which only the name was stored.

        Example:
            >>> config = SlowMoConfig.osgp(tau=8)
            >>> SlowMoConfig.from_facts(config.facts()) == config
            True
        """
        gossip = facts.get("gossip")
        if gossip is None:
            return cls(**facts)
        settings = dict(gossip)
        method: Any = METHODS[settings.pop("method")]
        return cls(**{**facts, "gossip": method(**settings)})
