"""SlowMo against Local Adam: a transformer learns to translate, with PyTorch.

The text is two files of parallel lines, such as WMT'16's English and German, with the settings of the paper: 200,000
pieces a batch over all workers, 25 epochs, Adam with betas of .9 and .98, a rate of 5e-4 after 4,000 steps of warm-up,
then with the inverse square root of the step, label smoothing of .1. Without files it is the Bible in the English of
1611, translated into Basic English, with a small model. Translations take the most likely piece after the other (the
paper searches with beams).

Run it with: torchrun --nproc-per-node 2 examples/translation_torch.py
Or over Horovod: hvd-slowmo run -np 8 python examples/translation_torch.py --source train.en --target train.de
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import comparison
import numpy as np
import parallel_text
import sacrebleu
import torch
from parallel_text import Batches, Pair, Text
from progress import Progress
from schedules import inverse_square_root
from torch.nn import functional as F
from torch_common import Mean, choose_device, logger
from transformer import PAD, Transformer

import hvd_slowmo.torch as slowmo

PAPER = {"tokens": 200_000, "epochs": 25, "lr": 5e-4, "warmup": 4000, "vocabulary": 32_000}
PAPER |= {"width": 512, "layers": 6, "heads": 8}
BIBLE = {"tokens": 4000, "epochs": 10, "lr": 2e-3, "warmup": 400, "vocabulary": 4000}
BIBLE |= {"width": 128, "layers": 2, "heads": 4}
METHODS = ("local-sgd", "slowmo")


class Data(NamedTuple):
    """A sentencepiece processor, the pieces to train on, and the sentences to translate."""

    pieces: Any
    pairs: list[Pair]
    test: Text


def parse(rank: int = 0, arguments: Sequence[str] | None = None) -> Namespace:
    """Parse the options. Their defaults depend on the text."""
    parser = comparison.make_parser(__doc__)
    add = parser.add_argument
    for name, text in (("source", "sentences to train on"), ("test-source", "sentences to translate in the test")):
        add(f"--{name}", type=Path, help=f"file of {text}, one per line; without it, the Bible")
        add(f"--{name.replace('source', 'target')}", type=Path, help="their translations, line by line")
    add("--evaluate", choices=("valid", "test"), default="test", help="held-out sentences for BLEU; tune with valid")
    comparison.add_method_options(add, methods=METHODS, seeds=1, inner_state="maintain")
    add("--epochs", type=int, help="passes over the text, all workers together")
    add("--tokens", type=int, help="pieces per step, all workers together")
    add("--lr", type=float, help="Adam's highest learning rate")
    add("--warmup", type=int, help="steps until then")
    add("--vocabulary", type=int, help="number of pieces")
    add("--width", type=int, help="width of the model")
    add("--layers", type=int, help="layers of the encoder, and of the decoder")
    add("--heads", type=int, help="heads of an attention")
    comparison.add_resume_options(add)
    parser.set_defaults(**(BIBLE if comparison.peek("--source", arguments) is None else PAPER))
    return comparison.parse(parser, rank, arguments)


def train(
    args: Namespace, method: str, seed: int, data: Data, device: torch.device, progress: Progress
) -> comparison.Run:
    """Train one method with one seed, from the newest checkpoint if there is one."""
    batches = Batches(data.pairs, args.tokens, seed, slowmo.rank(), slowmo.size())
    torch.manual_seed(seed)
    model = Transformer(len(data.pieces), args.width, args.layers, args.heads).to(device)
    inner = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98), eps=1e-9)
    optimizer = slowmo.SlowMo(inner, model, comparison.METHODS[method](args), metrics=args.logdir is not None)
    log = logger(args.logdir, f"{method}-{seed}")
    run, checkpoints = comparison.Run(method, seed), None
    if args.checkpoints is not None:
        checkpoints = slowmo.Checkpoints(args.checkpoints / f"{method}-{seed}")
        progress.skip(checkpoints.resume(optimizer))
        run = comparison.Run(**checkpoints.values.get("run", asdict(run)))

    for epoch in range(optimizer.steps // batches.steps, args.epochs):
        model.train()
        torch.manual_seed(dropout_seed(seed, epoch))
        begin, before, losses = time.perf_counter(), optimizer.bytes_sent, Mean()
        for batch in batches.epoch(epoch):
            source, target = (torch.from_numpy(array).to(device) for array in batch)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * inverse_square_root(optimizer.steps, args.warmup)
            optimizer.zero_grad()
            logits = model(source, target[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            losses.add(loss)
            log(optimizer)
            progress.update()
        loss = losses.take()  # waits for the GPU before the clock is read
        milliseconds = 1000 * (time.perf_counter() - begin) / batches.steps
        sent = optimizer.bytes_sent - before

        optimizer.join()  # all workers hold the mean
        run.add(optimizer.steps, **slowmo.mean({"loss": loss, "ms": milliseconds, "mb": sent / 1e6}))
        run.score.append(bleu(model, data.pieces, data.test, device))
        if checkpoints is not None:
            checkpoints.save(run=asdict(run))
            checkpoints.finish()
        progress.describe(f"{method}, seed {seed}, BLEU {run.score[-1]:.1f}")
    return run


def dropout_seed(seed: int, epoch: int) -> int:
    """Return a seed that differs between runs, epochs and workers."""
    return int(np.random.SeedSequence([seed, epoch, slowmo.rank()]).generate_state(1)[0])


def bleu(model: Transformer, pieces: Any, text: Text, device: torch.device, batch: int = 64) -> float:
    """Return the BLEU score of the whole text; each worker translates a part of it."""
    model.eval()
    own = sorted(zip(*(lines[slowmo.rank() :: slowmo.size()] for lines in text), strict=True), key=lambda p: len(p[0]))
    translations: list[str] = []
    for start in range(0, len(own), batch):
        sources = [[*pieces.encode(source), parallel_text.END] for source, _ in own[start : start + batch]]
        translations += pieces.decode(model.translate(torch.from_numpy(parallel_text.pad(sources)).to(device)))
    counts = torch.zeros(10, dtype=torch.float64)  # all workers' matches and lengths, of which BLEU is a function
    if own:
        found = sacrebleu.corpus_bleu(translations, [[target for _, target in own]])
        counts = torch.tensor([*found.counts, *found.totals, found.sys_len, found.ref_len], dtype=torch.float64)
    *both, translated, reference = (slowmo.mean(counts) * slowmo.size()).round().long().tolist()
    return sacrebleu.BLEU.compute_bleu(both[:4], both[4:], translated, reference, smooth_method="exp").score


def main() -> None:
    slowmo.init()
    args = parse(slowmo.rank())
    device = choose_device()
    corpus = parallel_text.load(args)
    wait = partial(slowmo.mean, 0.0)  # a collective
    pieces = parallel_text.make_pieces(corpus.train, args.vocabulary, args.out, slowmo.rank() == 0, wait)
    test = corpus.valid if args.evaluate == "valid" else corpus.test
    data = Data(pieces, parallel_text.encode(corpus.train, pieces), test)
    steps = args.epochs * Batches(data.pairs, args.tokens, 0, slowmo.rank(), slowmo.size()).steps
    runs = []
    with Progress(steps * args.seeds * len(args.methods), slowmo.rank()) as progress:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for method in args.methods:
                progress.describe(f"{method}, seed {seed}")
                runs.append(train(args, method, seed, data, device, progress))
    if slowmo.rank() == 0:
        task = "Bible" if args.source is None else args.source.name
        comparison.report("translation_torch", args, runs, slowmo.size(), task=f"Translation of {task}", measure="BLEU")


if __name__ == "__main__":
    main()
