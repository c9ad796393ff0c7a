"""The examples: what the digits examples share, and one short run under horovodrun."""

from __future__ import annotations

import json
import re
from pathlib import Path

import comparison
import digits_common as common
import numpy as np
import pytest
from running import EXAMPLES, PNG, horovodrun

from hvd_slowmo import DPSGD, SGP


def test_the_options_make_the_methods() -> None:
    args = common.parse(None, arguments=["--tau", "5", "--alpha", "0.9", "--beta", "0.3", "--inner-state", "average"])
    slowmo, local, ar = (comparison.METHODS[name](args) for name in ("slowmo", "local-sgd", "ar-sgd"))
    assert (slowmo.tau, slowmo.alpha, slowmo.beta, slowmo.inner_state) == (5, 0.9, 0.3, "average")
    assert (local.tau, local.alpha, local.beta, local.inner_state) == (5, 1, 0, "average")
    assert (ar.tau, ar.gradients) == (None, "all")


def test_the_options_make_the_gossip_methods() -> None:
    args = common.parse(None, arguments=["--tau", "5", "--beta", "0.3"])
    made = {name: method(args) for name, method in comparison.METHODS.items()}
    assert [made[name].tau for name in ("d-psgd", "sgp", "osgp")] == [None] * 3
    for name, gossip in (("d-psgd", DPSGD()), ("sgp", SGP()), ("osgp", SGP(overlap=True))):
        for config in (made[name], made[f"slowmo-{name}"]):
            assert (config.gossip, config.average) == (gossip, True)
        assert (made[f"slowmo-{name}"].tau, made[f"slowmo-{name}"].beta) == (5, 0.3)
    assert (made["slowmo-sgp-noaverage"].gossip, made["slowmo-sgp-noaverage"].average) == (SGP(), False)
    assert (made["slowmo-ar-sgd"].tau, made["slowmo-ar-sgd"].gradients) == (5, "all")


def test_every_method_can_be_drawn_and_told_apart() -> None:
    assert set(comparison.STYLES) == set(comparison.METHODS)
    assert len(set(comparison.STYLES.values())) == len(comparison.STYLES)


def test_the_default_is_three_methods_and_quick_is_one_run_of_slowmo() -> None:
    assert common.parse(None, arguments=[]).methods == ["ar-sgd", "local-sgd", "slowmo"]
    quick = common.parse(None, arguments=["--quick", "--methods", "ar-sgd", "local-sgd", "--seeds", "7"])
    assert (quick.methods, quick.seeds) == (["slowmo"], 1)


def test_the_help_says_every_default_and_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(4):
        with pytest.raises(SystemExit):
            common.parse("What it does.", rank, ["--help"])
    text, errors = capsys.readouterr()
    assert errors == ""
    assert text.count("What it does.") == 1
    assert " ".join(text.split()).count("(default: ") == text.count("\n  --")


@pytest.mark.parametrize("how", ["random", "sorted"])
def test_shards_are_disjoint_and_of_one_size(how: str) -> None:
    classes = common.load().train_classes
    shards = [common.shard(classes, how, rank, 4, seed=3) for rank in range(4)]
    assert [len(shard) for shard in shards] == [1437 // 4] * 4
    assert len(np.unique(np.concatenate(shards))) == 1437 // 4 * 4
    assert [len(np.unique(classes[shard])) <= 4 for shard in shards] == [how == "sorted"] * 4


def test_batches_fill_an_epoch_and_differ_between_epochs() -> None:
    rng = np.random.default_rng(0)
    one, two = (list(common.batches(np.arange(100, 130), 8, rng)) for _ in range(2))
    assert [len(batch) for batch in one] == [8, 8, 8]
    assert len(np.unique(np.concatenate(one))) == 24
    assert not np.array_equal(np.concatenate(one), np.concatenate(two))


def test_more_workers_than_batches_is_an_error() -> None:
    with pytest.raises(ValueError, match="1437 images are too few for 4 workers and 500 a batch"):
        common.steps_per_epoch(common.load(), 500, 4)


@pytest.mark.slow
def test_report_prints_a_table_and_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = common.parse(None, arguments=["--seeds", "3", "--out", str(tmp_path / "new" / "results")])
    runs = [
        comparison.Run(method, seed, [10, 20], [1.0, 0.5 + seed / 10], [50.0, 90.0 + seed], 1.5 + seed, 0.25)
        for seed in range(args.seeds)
        for method in args.methods
    ]
    common.report("digits", args, runs, workers=4)
    assert re.search(r"^slowmo +91\.0 ± 1\.0 +2\.50 +0\.25$", capsys.readouterr().out, re.MULTILINE)
    image = (args.out / "digits.png").read_bytes()
    assert image.startswith(PNG)
    assert len(image) > 20_000
    results = json.loads((args.out / "digits.json").read_text(encoding="utf-8"))
    assert results["settings"]["tau"] == args.tau
    assert [run["score"][-1] for run in results["runs"]] == [run.score[-1] for run in runs]


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["digits_torch", "digits_keras"])
def test_quick_run_under_horovodrun(name: str, tmp_path: Path) -> None:
    script = EXAMPLES / f"{name}.py"
    output = horovodrun(2, script, "--quick", "--metrics", "--out", tmp_path, "--logdir", tmp_path / "logs")
    assert re.search(r"┃ step ┃ divergence ┃", output)
    line = re.search(r"slowmo +(\d+\.\d) +\d+\.\d\d +\d+\.\d\d$", output, re.MULTILINE)
    assert line, output
    assert float(line[1]) > 80
    assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    assert list((tmp_path / "logs" / "slowmo-0").iterdir()), "nothing for TensorBoard"
    assert len(json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["runs"]) == 1


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.workers
def test_quick_run_of_both_frameworks(tmp_path: Path) -> None:
    output = horovodrun(2, EXAMPLES / "digits_mixed.py", "--quick", "--out", tmp_path)
    line = re.search(r"slowmo, mixed +(\d+\.\d) +\d+\.\d\d +\d+\.\d\d$", output, re.MULTILINE)
    assert line, output
    assert float(line[1]) > 80
    right = re.findall(r"rank \d, (PyTorch|Keras) +(\d+) of 360 test images right", output)
    assert [name for name, _ in right] == ["PyTorch", "Keras"]
    assert right[0][1] == right[1][1]
    assert "The workers classify 360 of 360 test images alike." in output
    assert (tmp_path / "digits_mixed.png").read_bytes().startswith(PNG)


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["minimal_torch", "minimal_keras", "custom_loop_keras"])
def test_small_examples_learn_under_horovodrun(name: str) -> None:
    output = horovodrun(2, EXAMPLES / f"{name}.py")
    found = re.findall(r"test accuracy (\d+\.\d) %", output)
    found += [str(100 * float(x)) for x in re.findall(r"val_accuracy: (\d\.\d+)", output)]
    assert found, output
    assert float(found[-1]) > 90
