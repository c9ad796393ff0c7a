"""Memory of the vectors that a job keeps beside its model."""

from __future__ import annotations

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.whole import divided_vectors


def bytes_beside_model(
    config: SlowMoConfig,
    parameters: int,
    sliced: int,
    workers: int,
    gossip_vectors: int = 0,
    *,
    whole_in_flight: bool = False,
) -> int:
    """Return the bytes of the vectors that one worker keeps beside its model; messages in flight are additional.

    Args:
        parameters: bytes of the parameters, as they travel.
        sliced: bytes of those that travel in slices.
        workers: number of workers.
        gossip_vectors: number of vectors that the gossip keeps.
        whole_in_flight: with a delay there is room for all parameters in flight, and not for the fragments that are.

    Example:
        >>> bytes_beside_model(SlowMoConfig(), 12_000, 0, workers=2)
        24000
        >>> bytes_beside_model(SlowMoConfig.streaming(tau=12), 12_000, 12_000, workers=2)
        43000
    """
    kept = (len(config.vectors) + gossip_vectors) * parameters
    in_flight = -(-config.delay * config.fragments // (config.tau or 1))  # fragments, at most
    in_flight = config.fragments if in_flight and whole_in_flight else in_flight
    kept += in_flight * parameters // config.fragments
    return kept + len(config.sliced_vectors) * sliced // workers - len(divided_vectors(config)) * sliced
