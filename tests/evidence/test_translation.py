"""The translation of the evidence: its text, its batches, a small run and its section of the page."""

import numpy as np
import pytest
import torch

parallel_text = pytest.importorskip("parallel_text")
pytest.importorskip("sacrebleu")

from evidence import page, runs, translation  # noqa: E402 - it needs sacrebleu
from evidence.results import Key, Results  # noqa: E402 - as above
from evidence.studies import FULL, QUICK, Translation, translators  # noqa: E402 - as above
from transformer import BEGIN, END, PAD  # noqa: E402 - as above

WORDS = ("cat", "dog", "sees", "home", "today", "friend", "rain", "walk")


def verses(count, seed):
    rng = np.random.default_rng(seed)
    sources = [" ".join(rng.choice(WORDS, size=rng.integers(2, 8))) for _ in range(count)]
    return parallel_text.Text(sources, [" ".join(reversed(source.split())) for source in sources])


@pytest.fixture
def small_bible(monkeypatch):
    corpus = parallel_text.Corpus(verses(60, 0), verses(8, 1), verses(8, 2))
    corpus.train.sources.append("long " * 30)
    corpus.train.targets.append("short")
    monkeypatch.setattr(parallel_text, "load_bible", lambda: corpus)
    monkeypatch.setattr(translation, "PIECES", 50)
    monkeypatch.setattr(translation, "WIDTH", 16)
    monkeypatch.setattr(translation, "HEADS", 2)
    translation.data.cache_clear()
    yield corpus
    translation.data.cache_clear()


def test_long_verses_are_left_out(small_bible):
    assert translation.short(small_bible.train) == tuple(lines[:-1] for lines in small_bible.train)
    assert len(translation.data().pairs) == 60


def test_workers_share_an_epoch_of_similar_lengths():
    rng = np.random.default_rng(0)
    pairs = [([10 + n] * int(rng.integers(1, 30)), [10 + n] * int(rng.integers(1, 30))) for n in range(100)]
    source = translation.batches(pairs, 4, seed=1)
    epoch = [next(source) for _ in range(100 // (4 * translation.SENTENCES))]
    seen = []
    for x, y in epoch:
        assert x.shape[:2] == y.shape[:2] == (4, translation.SENTENCES)
        assert (y[..., 0] == BEGIN).all()
        for row in x.flatten(0, 1).tolist():
            length = row.index(END)
            assert row[:length] == [row[0]] * length
            assert row[length + 1 :] == [PAD] * (len(row) - length - 1)
        seen += x[..., 0].flatten().tolist()
        longest = [max(map(len, pairs[first - 10])) for first in x[..., 0].flatten().tolist()]
        assert max(longest) - min(longest) < 15
    assert len(set(seen)) == len(seen) == 96
    again = next(translation.batches(pairs, 4, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(again, epoch[0], strict=True))


def test_the_loss_of_the_held_out_verses_is_per_piece(small_bible):
    torch.manual_seed(0)
    model = translation.Translator().eval()
    text, pieces = small_bible.test, translation.data().pieces
    total, count = 0.0, 0
    for source, target in zip(*text, strict=True):  # one verse after the other, without padding
        x = torch.tensor([[*pieces.encode(source), END]])
        y = [BEGIN, *pieces.encode(target), END]
        logits = model((x, torch.tensor([y[:-1]])))[0].double().detach().numpy()
        logits -= logits.max(axis=1, keepdims=True)
        rows = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total -= rows[np.arange(len(y) - 1), y[1:]].sum()
        count += len(y) - 1
    found = translation.evaluate(model, text)
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert 0 <= found.bleu < 20


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Local Adam + SlowMo", "SGP with Adam"])
def test_a_run_learns(small_bible, method):
    (cell,) = [cell for cell in translators(FULL.translation) if cell.name == method]
    before = translation.train(cell.config, 2, 1e-9, 0, 1, "test").loss
    assert translation.train(cell.config, 2, 0.5, 0, 25, "test").loss < before - 0.3


def test_the_section_has_a_verdict_for_every_method(tmp_path):
    study = Translation(seeds=3, tuning_seeds=(9,), rates=(0.1,), workers=8, steps=100)
    results = Results(tmp_path / "translation.csv", runs.TRANSLATION_COLUMNS)
    for seed in range(3):
        for number, cell in enumerate(translators(study)):
            results.add(Key(cell.name, 8, 0.1, seed, 100), [10.0 + number + 0.01 * seed, 2.0 - 0.1 * number])
    rates = {cell.name: 0.1 for cell in translators(study)}
    text = "\n".join(page.translation_section((results, rates), study, "make evidence"))
    assert "| Local Adam | 10.0 ± 0.0 | 11.0 ± 0.0 | +1.0 ± 0.0 | shown | 2.00 ± 0.00 | 1.90 ± 0.00 |" in text
    assert "- SlowMo improves AR-Adam: shown (+1.0 ± 0.0 BLEU)." in text
    assert "- SlowMo over Local Adam is better than SGP with Adam: against it (-1.0 ± 0.0 BLEU)." in text


def test_a_quick_page_says_that_it_has_no_translation():
    without = "\n".join(page.translation_section(None, QUICK.translation, "make evidence-quick"))
    assert "Left out by `make evidence-quick`" in without
