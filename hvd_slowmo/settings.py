"""Types and names of the settings, and the names under which users of other libraries look for them."""

from __future__ import annotations

from typing import Literal, TypedDict

from hvd_slowmo.gossip import Gossip

InnerState = Literal["maintain", "reset", "average"]
Gradients = Literal["local", "node", "all"]
Nonfinite = Literal["raise", "exclude"]
Bits = Literal[32, 16, 8, 4]
SlowState = Literal["device", "host"]

_OTHER_NAMES = {
    "base": "gossip=SGP(...) or gossip=DPSGD(...)",
    "topology": "gossip=SGP(topology=...) or gossip=DPSGD(topology=...)",
    "overlap": "gossip=SGP(overlap=True)",
    "buffers": "inner_state",
    **dict.fromkeys(("period", "sync_every", "local_steps", "slowmo_frequency", "slowmo_freq", "H", "k"), "tau"),
    **dict.fromkeys(("lr", "slow_lr", "outer_lr", "slowmo_lr", "block_lr"), "alpha"),
    **dict.fromkeys(("momentum", "slow_momentum", "slowmo_factor", "slowmo_momentum", "block_momentum"), "beta"),
    "start_localSGD_iter": "warmup_steps",
}
OTHER_NAMES = {name: f"Use {here}." for name, here in _OTHER_NAMES.items()}
"""Names under which users of other libraries may look for a setting, with the replacement in a sentence."""


class SlowMoSettings(TypedDict, total=False):
    """Types of the fields of `SlowMoConfig`, for functions that take them as keywords."""

    tau: int | None
    alpha: float
    beta: float
    nesterov: bool
    scale_by_lr: bool
    inner_state: InnerState
    gossip: Gossip | None
    average: bool
    gradients: Gradients
    warmup_steps: int
    nonfinite: Nonfinite
    fragments: int
    delay: int
    bits: Bits
    shard: bool
    slow_state: SlowState
