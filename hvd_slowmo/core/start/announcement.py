"""One line about a job that has started: its method, its workers, its traffic and its memory."""

from __future__ import annotations

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.layout import ITEMSIZE, Chunk, Layout
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.start.memory import bytes_beside_model
from hvd_slowmo.gossip import SGP


def announcement(
    config: SlowMoConfig, layout: Layout, graph: Graph | None, workers: int, *, whole_in_flight: bool
) -> str:
    """Return the line.

    Traffic is what one worker hands to Horovod; a ring sends up to twice as much. Memory is that of the vectors beside
    the model.

    Args:
        layout: of the messages.
        graph: of the gossip; None without.
        workers: number of workers.
        whole_in_flight: as of `bytes_beside_model`.
    """

    def length(chunk: Chunk) -> int:
        return chunk.size * ITEMSIZE[layout.segments[chunk.segment].dtype]

    def sent(chunk: Chunk) -> int:
        return length(chunk) * (config.bits if layout.segments[chunk.segment].sliced else 32) // 32

    parameters = sum(map(length, layout.parameter_chunks))
    traffic = []
    if config.gradients != "local":
        traffic.append(f"{size_in_words(parameters)} of gradients per step")
    if graph is not None:
        traffic.append(f"{size_in_words(parameters)} per gossip message")
    if config.tau is not None and config.average:
        traffic.append(f"{size_in_words(sum(map(sent, layout.chunks)))} per outer step")
    sliced = sum(length(chunk) for chunk in layout.chunks if layout.segments[chunk.segment].sliced)
    vectors = 0 if graph is None else len(graph.vectors)
    kept = bytes_beside_model(config, parameters, sliced, workers, vectors, whole_in_flight=whole_in_flight)
    memory = f"{size_in_words(kept)} of memory beside the model"
    if workers == 1:
        return f"{method(config)}, 1 worker; {memory}"
    return f"{method(config)}, {workers} workers; on each {', '.join([*traffic, memory])}"


def method(config: SlowMoConfig) -> str:
    """Return the method of a configuration in the field's words.

    Example:
        >>> method(SlowMoConfig(tau=12, beta=0.6))
        'local SGD with slow momentum (tau=12, alpha=1, beta=0.6)'
        >>> method(SlowMoConfig.streaming(tau=12))
        'local SGD with slow momentum (tau=12, alpha=1, beta=0.5, 12 fragments, 1 step late, 8 bits)'
        >>> method(SlowMoConfig.osgp())
        'SGP with overlap (OSGP)'
    """
    words = _inner_method(config)
    if config.tau is not None:
        numbers = [f"tau={config.tau}"]
        if config.vectors:
            numbers.append(f"alpha={config.alpha:g}")
            words += " with a slow learning rate" if config.beta == 0 else ""
        if config.beta > 0:
            numbers.append(f"beta={config.beta:g}")
            words += " with Nesterov slow momentum" if config.nesterov else " with slow momentum"
        numbers += [f"{config.fragments} fragments"] if config.fragments > 1 else []
        numbers += [f"{config.delay} step{'s' * (config.delay > 1)} late"] if config.delay else []
        numbers += [f"{config.bits} bits"] if config.bits < 32 else []
        numbers += ["divided outer state"] if config.shards else []
        words += "" if config.average else " without its average"
        words += f" ({', '.join(numbers)})"
    if config.warmup_steps and config.gradients != "all":
        words += f" after {config.warmup_steps} steps of AR-SGD"
    return words


def _inner_method(config: SlowMoConfig) -> str:
    """Return the method between outer steps."""
    if config.gradients == "all":
        return "AR-SGD"
    if config.gossip is None:
        words = "local SGD"
    elif isinstance(config.gossip, SGP):
        words = "SGP with overlap (OSGP)" if config.gossip.overlap else "SGP"
    else:
        words = "D-PSGD"
    return f"{words} between nodes" if config.gradients == "node" else words


def size_in_words(size: int) -> str:
    """Return a number of bytes in words.

    Example:
        >>> size_in_words(120), size_in_words(4_500), size_in_words(100_663_296), size_in_words(2_500_000_000)
        ('120 bytes', '4.5 kB', '100.7 MB', '2.5 GB')
    """
    if size < 1000:
        return f"{size} bytes"
    for unit, name in ((1e3, "kB"), (1e6, "MB")):
        if size < 1000 * unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e9:.1f} GB"
