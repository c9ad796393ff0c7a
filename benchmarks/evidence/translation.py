"""The translation task: short verses of the Bible from the English of 1611 into Basic English, on simulated workers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import parallel_text
import torch
from parallel_text import Pair, Text
from schedules import inverse_square_root
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformer import BEGIN, END, PAD, Transformer
from translation_torch import bleu

import hvd_slowmo.torch as slowmo
from hvd_slowmo_torch.simulator.simulation import DivergedError

WORDS = 20  # of the longest verses
PIECES, WIDTH, LAYERS, HEADS = 1000, 64, 1, 4
SENTENCES = 3  # per worker and step
WARMUP = 200  # steps


class Data(NamedTuple):
    """The processor of pieces, the pairs to train on, and the verses to translate."""

    pieces: Any
    pairs: list[Pair]
    held_out: dict[str, Text]


@cache
def data() -> Data:
    """Return the short verses of each part of the Bible."""
    corpus = parallel_text.load_bible()
    train, valid, test = map(short, corpus)
    with tempfile.TemporaryDirectory() as folder:
        pieces = parallel_text.make_pieces(train, PIECES, Path(folder), True, lambda: None)
    return Data(pieces, parallel_text.encode(train, pieces, longest=2 * WORDS), {"validation": valid, "test": test})


def short(text: Text) -> Text:
    """Return the verses with at most `WORDS` words in both languages."""
    pairs = [pair for pair in zip(*text, strict=True) if max(len(verse.split()) for verse in pair) <= WORDS]
    return Text(*map(list, zip(*pairs, strict=True)))


class Translator(nn.Module):
    """The example's transformer with one argument: sources, and the pieces of the targets but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = Transformer(len(data().pieces), WIDTH, LAYERS, HEADS, dropout=0.0)

    def forward(self, both: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.transformer(*both)


def arrays(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sources, and targets from BEGIN to END, both padded."""
    sources = parallel_text.pad([[*source, END] for source, _ in pairs])
    return torch.from_numpy(sources), torch.from_numpy(
        parallel_text.pad([[BEGIN, *target, END] for _, target in pairs])
    )


def batches(pairs: Sequence[Pair], workers: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield sources and targets (workers, SENTENCES, length) endlessly; the verses of a step are of similar length."""
    rng = np.random.default_rng(seed)
    lengths = np.array([max(map(len, pair)) for pair in pairs])
    each = workers * SENTENCES
    while True:
        order = rng.permutation(len(pairs))[: len(pairs) // each * each]
        steps = order[np.argsort(lengths[order], kind="stable")].reshape(-1, each)
        for step in rng.permutation(steps):
            source, target = arrays([pairs[place] for place in rng.permutation(step)])
            yield source.view(workers, SENTENCES, -1), target.view(workers, SENTENCES, -1)


def smoothed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy with label smoothing, as in the paper."""
    return cross_entropy(logits, targets, smoothing=0.1)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the mean over the pieces, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, label_smoothing=smoothing)


class Outcome(NamedTuple):
    """The outcome of a run for the workers' mean model and the held-out verses; NaN where it has diverged."""

    bleu: float
    loss: float  # mean over the pieces, nats


def train(config: slowmo.SlowMoConfig, workers: int, lr: float, seed: int, steps: int, held_out: str) -> Outcome:
    """Train with Adam, the paper's schedule and label smoothing."""
    simulation = slowmo.Simulation(
        Translator,
        inner=lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.98), eps=1e-9, fused=True),
        loss=smoothed,
        workers=workers,
        config=config,
        seed=seed,
    )
    source = batches(data().pairs, workers, seed)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no vectorized form
            for step in range(steps):
                for group in simulation.inner_optimizer.param_groups:
                    group["lr"] = lr * inverse_square_root(step, WARMUP)
                x, y = next(source)
                simulation.step((x, y[..., :-1]), y[..., 1:])
        model = simulation.mean_model()
    except DivergedError:
        return Outcome(math.nan, math.nan)
    return evaluate(model, data().held_out[held_out])


def evaluate(model: nn.Module, text: Text) -> Outcome:
    """Return BLEU of the most likely piece after the other, and the loss of the true ones."""
    pieces = data().pieces
    source, target = arrays(list(zip(pieces.encode(text.sources), pieces.encode(text.targets), strict=True)))
    with torch.no_grad():
        loss = cross_entropy(model((source, target[:, :-1])), target[:, 1:])
    return Outcome(bleu(model.transformer, pieces, text, torch.device("cpu")), float(loss))
