"""The field's named methods as presets of the settings: the table "special cases" of docs/algorithm.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from typing_extensions import Self

from hvd_slowmo.gossip import DPSGD, SGP, Topology
from hvd_slowmo.keywords import refuse_unknown
from hvd_slowmo.settings import OTHER_NAMES, SlowMoSettings

Preset = TypeVar("Preset", bound=Callable[..., "Presets"])


def _preset(make: Preset) -> Preset:
    """Let a preset refuse an unknown keyword in its own name; Python would name SlowMoConfig and no setting."""
    own = [name for name, p in inspect.signature(make).parameters.items() if p.kind is not p.VAR_KEYWORD][1:]

    @wraps(make)
    def checked(cls: type[Presets], /, *args: Any, **settings: Any) -> Presets:
        known = dict.fromkeys([*own, *SlowMoSettings.__annotations__])
        refuse_unknown(f"SlowMoConfig.{make.__name__}", settings, known, OTHER_NAMES)
        return make(cls, *args, **settings)

    return cast(Preset, checked)


class Presets:
    """The presets of SlowMoConfig. Each takes any further setting by keyword."""

    if TYPE_CHECKING:

        def __init__(self, **settings: Any) -> None: ...

    @classmethod
    @_preset
    def local_sgd(cls, tau: int, **settings: Any) -> Self:
        """Return Local SGD (Stich 2019): the plain mean of the parameters every tau steps.

        Example:
            >>> from hvd_slowmo import SlowMoConfig
            >>> SlowMoConfig.local_sgd(tau=12).beta
            0.0
        """
        return cls(**{"tau": tau, "alpha": 1.0, "beta": 0.0, **settings})

    @classmethod
    @_preset
    def bmuf(
        cls, tau: int, block_lr: float = 1.0, block_momentum: float = 0.5, nesterov: bool = False, **settings: Any
    ) -> Self:
        """Return blockwise model-update filtering (Chen and Huo 2016), classical or Nesterov.

        Args:
            tau: inner steps per block.
            block_lr: the paper's zeta, alpha here.
            block_momentum: the paper's eta, beta here.
            nesterov: the Nesterov form.

        Example:
            >>> from hvd_slowmo import SlowMoConfig
            >>> SlowMoConfig.bmuf(tau=16, block_momentum=0.9).scale_by_lr
            False
        """
        momentum = {"nesterov": nesterov, "scale_by_lr": block_momentum == 0}
        return cls(**{"tau": tau, "alpha": block_lr, "beta": block_momentum, **momentum, **settings})

    @classmethod
    @_preset
    def lookahead(cls, tau: int, alpha: float = 0.5, **settings: Any) -> Self:
        """Return Lookahead (Zhang et al. 2019): a step of length alpha towards the fast weights.

        Example:
            >>> from hvd_slowmo import SlowMoConfig
            >>> SlowMoConfig.lookahead(tau=5).vectors
            ('anchor',)
        """
        return cls(**{"tau": tau, "alpha": alpha, "beta": 0.0, **settings})

    @classmethod
    @_preset
    def diloco(cls, tau: int, **settings: Any) -> Self:
        """Return DiLoCo (Douillard et al. 2023): outer Nesterov SGD(0.7, 0.9) over AdamW with maintained state.

        Example:
            >>> from hvd_slowmo import SlowMoConfig
            >>> config = SlowMoConfig.diloco(tau=500)
            >>> config.alpha, config.beta, config.nesterov
            (0.7, 0.9, True)
        """
        paper = {"alpha": 0.7, "beta": 0.9, "nesterov": True, "scale_by_lr": False, "inner_state": "maintain"}
        return cls(**{"tau": tau, **paper, **settings})

    @classmethod
    @_preset
    def streaming(cls, tau: int, **settings: Any) -> Self:
        """Return SlowMo for a slow network: a part of the parameters at every step, one step late, in 8 bits.

        Example:
            >>> from hvd_slowmo import SlowMoConfig
            >>> config = SlowMoConfig.streaming(tau=12)
            >>> config.fragments, config.delay, config.bits
            (12, 1, 8)
        """
        return cls(**{"tau": tau, **_streamed(tau), **settings})

    @classmethod
    @_preset
    def streaming_diloco(cls, tau: int, **settings: Any) -> Self:
        """Return DiLoCo in parts, one step late and in 8 bits, as Streaming DiLoCo (Douillard et al. 2025).

        There the parts are groups of layers and travel in 4 bits; the workers mix the late result with their own
        parameters, where here they keep all that they have trained meanwhile.

        Example:
            >>> from hvd_slowmo import SlowMoConfig
            >>> config = SlowMoConfig.streaming_diloco(tau=100, fragments=20)
            >>> config.alpha, config.beta, config.fragments
            (0.7, 0.9, 20)
        """
        return cls.diloco(**{"tau": tau, **_streamed(tau), **settings})

    @classmethod
    @_preset
    def sgp(cls, *, topology: Topology = None, **settings: Any) -> Self:
        """Return stochastic gradient push (Assran et al. 2019) alone; with tau=... below SlowMo.

        Example:
            >>> from hvd_slowmo import SlowMoConfig
            >>> SlowMoConfig.sgp().tau is None
            True
        """
        return cls(**{"gossip": SGP(topology=topology), **cls._alone(settings), **settings})

    @classmethod
    @_preset
    def osgp(cls, *, topology: Topology = None, **settings: Any) -> Self:
        """Return SGP with overlap: each message is mixed one step late and travels beside the computation.

        Example:
            >>> from hvd_slowmo import SlowMoConfig
            >>> SlowMoConfig.osgp(tau=48, beta=0.6).gossip
            SGP(topology=None, overlap=True)
        """
        return cls(**{"gossip": SGP(topology=topology, overlap=True), **cls._alone(settings), **settings})

    @classmethod
    @_preset
    def dpsgd(cls, *, topology: Topology = None, **settings: Any) -> Self:
        """Return decentralized parallel SGD (Lian et al. 2017) alone; with tau=... below SlowMo.

        Example:
            >>> from hvd_slowmo import SlowMoConfig
            >>> SlowMoConfig.dpsgd().gossip
            DPSGD(topology=None)
        """
        return cls(**{"gossip": DPSGD(topology=topology), **cls._alone(settings), **settings})

    @staticmethod
    def _alone(settings: dict[str, Any]) -> dict[str, Any]:
        return {} if settings.get("tau") is not None else {"tau": None, "alpha": 1.0, "beta": 0.0}

    @classmethod
    @_preset
    def ar_sgd(cls, **settings: Any) -> Self:
        """Return AR-SGD: gradients averaged over all workers at every step, no outer step.

        Example:
            >>> from hvd_slowmo import SlowMoConfig
            >>> SlowMoConfig.ar_sgd().gradients
            'all'
        """
        return cls(**{"tau": None, "alpha": 1.0, "beta": 0.0, "gradients": "all", **settings})


def _streamed(tau: int) -> dict[str, Any]:
    return {"fragments": tau, "delay": 1, "bits": 8}
