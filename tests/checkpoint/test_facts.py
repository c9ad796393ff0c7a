"""Facts from a file: typed records, or one error that names file, field and what was found."""

import copy
import dataclasses
import json
import subprocess
import sys
import textwrap

import msgspec
import numpy as np
import pytest
import torch

from hvd_slowmo.checkpoint import file as safefile
from hvd_slowmo.checkpoint.bounded_json import MAX_DEPTH, MAX_LENGTH, decode
from hvd_slowmo.checkpoint.facts import ConfigFacts, TrainingFacts, WeightsFacts, parse_config
from hvd_slowmo.checkpoint.job import read_checkpoint
from hvd_slowmo.checkpoint.progress import check_progress, check_rates, parse_progress
from hvd_slowmo.cli.main import main
from hvd_slowmo.errors import CheckpointError, CheckpointFileError, escape_controls
from hvd_slowmo.torch import SGP, SlowMoConfig
from support.checkpoints import one, saved, train
from support.faulty_files import RawFile


def forge(path, change):
    """Change a file's raw parts, and make its checksums right."""
    raw = RawFile(path)
    change(raw)
    raw.sign()
    path.write_bytes(raw.packed())


def test_the_record_of_the_settings_has_their_fields():
    assert [f.name for f in dataclasses.fields(SlowMoConfig)] == [f.name for f in msgspec.structs.fields(ConfigFacts)]


@pytest.mark.slow
def test_threads_that_parse_a_new_type_at_once_do_not_crash():
    code = """
        import sys, threading
        from msgspec import defstruct
        from hvd_slowmo.checkpoint.facts import parse

        sys.setswitchinterval(1e-6)
        for number in range(200):
            inner = defstruct("Inner", [(name, "int | None") for name in "abc"], module=__name__)
            outer = defstruct("Outer", [("x", inner), ("y", tuple[inner, ...]), ("z", "int | None")], module=__name__)
            value = {"x": {"a": 1, "b": 2, "c": 3}, "y": [{"a": 4, "b": 5, "c": 6}], "z": 7}
            start, found = threading.Barrier(4), []

            def work():
                start.wait()
                found.append(parse(value, outer, "this").y[0].c)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert found == [6] * 4
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_facts_are_records(checkpoint, tmp_path):
    facts = read_checkpoint(checkpoint, 0, 1).facts
    assert isinstance(facts, TrainingFacts)
    assert facts.config.tau == 3
    assert facts.tensors[0].shape == (4, 3)
    saved(tmp_path / "two", 2, 3)
    assert sorted(read_checkpoint(tmp_path / "two", 1, 2).facts.files) == [0, 1]


FAULTS = {
    "type": (lambda f: f.update(workers="1"), r"Expected `int`, got `str` - at `\$.workers`. Received: '1'"),
    "missing": (lambda f: f.pop("files"), "missing required field `files`"),
    "unknown": (lambda f: f.update(code="x"), "unknown field `code`"),
    "range": (lambda f: f["config"].update(tau=0), r"Expected `int` >= 1 - at `\$.config.tau`. Received: 0"),
    "choice": (lambda f: f.update(naming="jax"), r"Invalid enum value 'jax' - at `\$.naming`"),
    "length": (lambda f: f["tensors"][1].pop(), r"at least length 5, got 4 - at `\$.tensors\[1\]`"),
    "path": (lambda f: f.update(files={"0": "../../etc/x"}), r"matching regex .* - at `\$.files"),
    "rank": (lambda f: f.update(files={"1": "0" * 32}), "Expected ranks below 1 in `files`, got 1"),
    "kind": (lambda f: f.update(per_worker=["code"]), r"Invalid enum value 'code' - at `\$.per_worker\[0\]`"),
    "terminal": (lambda f: f.update(naming="\x1b[2J"), r"'\\x1b\[2J' - at `\$.naming`"),
    "both": (lambda f: f.update(rank=0), "unknown field `config`"),
    "whole": (lambda f: f.clear(), "missing required field `config`"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_error_with_file_field_and_what_was_found(name, checkpoint, capsys):
    change, words = FAULTS[name]
    forge(checkpoint, lambda raw: change(raw.ours["facts"]))
    _, optimizer = one()
    with pytest.raises(CheckpointError, match=words) as caught:
        optimizer.load(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert optimizer.steps == 0
    assert main(["inspect", str(checkpoint)]) == 1
    assert capsys.readouterr().err == f"hvd-slowmo inspect: {caught.value}\n"


def test_depth_and_length_are_limited_before_json_is_decoded(checkpoint, monkeypatch):
    raw = RawFile(checkpoint)
    raw.ours["facts"]["graph"] = "@deep@"
    checkpoint.write_bytes(raw.packed())
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("it was decoded"))
    with pytest.raises(CheckpointError, match=f"more than {MAX_DEPTH} arrays and objects within each other"):
        safefile.read(checkpoint)
    with pytest.raises(ValueError, match=f"has {MAX_LENGTH + 1} characters, more than {MAX_LENGTH}"):
        decode(" " * (MAX_LENGTH + 1))


def test_brackets_in_texts_do_not_count_and_an_unfinished_text_takes_linear_time():
    text = json.dumps({"[" * 99: ['"[[[\\', "{" * 99]})
    assert decode(text) == json.loads(text)
    for unfinished in ('"' + '\\"' * 10**6, '["' * 10**6):
        with pytest.raises(ValueError, match=r"Unterminated|within each other"):
            decode(unfinished)


def test_a_header_that_says_to_be_huge_is_not_read(checkpoint):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    with pytest.raises(CheckpointError, match="its header has 1099511627776 bytes, more than 100000000"):
        safefile.read(checkpoint)


def test_more_facts_than_a_reader_takes_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(safefile, "MAX_LENGTH", 200)
    facts = WeightsFacts(naming="wire", reason="x" * 200, tensors=())
    with pytest.raises(CheckpointError, match="and a reader takes 200"):
        safefile.write(tmp_path / "file", facts, {})
    assert not list(tmp_path.iterdir())


ARRAYS = {
    "step": (("progress/step", "I64", -1), r"'step' must be an integer >= 0. Received: -1"),
    "since": (("progress/since", "I64", 99), r"'since' must be at most the step, 4. Received: 99"),
    "rate sums": (("progress/rate_sums", "F64", float("nan")), r"'rate_sums' must be finite and >= 0. Received: nan"),
    "rates": (("progress/learning_rate", "F64", -0.5), r"'learning_rate' must be finite and >= 0. Received: -0.5"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_position_of_no_run_is_refused_when_it_is_loaded(name, checkpoint):
    (array, dtype, value), words = ARRAYS[name]
    like = {"I64": "int64", "F64": "float64"}[dtype]

    def change(raw):
        size = len(raw.arrays[array][2]) // 8
        raw.arrays[array][2] = np.full(size, value, like).tobytes()

    forge(checkpoint, change)
    with pytest.raises(CheckpointError, match=words):
        one()[1].load(checkpoint)


def test_a_missing_array_of_adam_is_refused_when_it_is_loaded(tmp_path):
    model, optimizer = one(base=lambda parameters: torch.optim.Adam(parameters))
    train(model, optimizer, 2)
    optimizer.save(tmp_path / "checkpoint")
    forge(tmp_path / "checkpoint", lambda raw: raw.arrays.pop("optimizer_state/moment2/0.linear.weight"))
    with pytest.raises(CheckpointError, match=r"state\[0\] has no 'exp_avg_sq'"):
        one(base=lambda parameters: torch.optim.Adam(parameters))[1].load(tmp_path / "checkpoint")


STATES = {
    "progress": (lambda s: s["slowmo"]["progress"].update(step="3"), "'step' must be integers of shape"),
    "missing": (lambda s: s["slowmo"]["progress"].pop("gamma"), "the position has no field 'gamma'"),
    "rates": (lambda s: s["slowmo"]["progress"].update(rate_sums=[[-1.0]]), "'rate_sums' must be finite and >= 0"),
    "vectors": (lambda s: s["slowmo"]["vectors"].pop("v"), "vectors are cut otherwise"),
    "no tensor": (lambda s: s["slowmo"]["vectors"].update(v=[[0.5]]), r"Expected `Tensor`, got `list`"),
    "lr": (lambda s: s["param_groups"][0].update(lr="0.1"), r"param_groups\[0\]\['lr'\] must be a number"),
    "negative": (lambda s: s["param_groups"][0].update(lr=-0.1), r"\['lr'\] must be a finite number >= 0"),
    "no momentum": (lambda s: s["param_groups"][0].pop("momentum"), r"param_groups\[0\] has no 'momentum'"),
    "params": (lambda s: s["param_groups"][0]["params"].pop(), "the numbers of 6 parameters"),
    "shape": (lambda s: s["state"][0].update(momentum_buffer=s["state"][1]["momentum_buffer"]), r"shape \(4, 3\)"),
    "groups": (lambda s: s.update(param_groups={}), "param_groups must be a list"),
    "entry": (lambda s: s.update(slowmo=[1]), "Expected `object`, got `array`"),
    "watch": (lambda s: s["slowmo"]["watch"]["entered"].append(True), "'watch' is of .* fragments"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_wrong_state_dict_is_noticed_when_it_is_loaded(name):
    change, words = STATES[name]
    model, optimizer = one()
    train(model, optimizer, 4)
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=words):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == str(before)


def test_groups_of_an_older_pytorch_are_completed_as_pytorch_does():
    model, optimizer = one()
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    for key in ("foreach", "maximize", "differentiable", "fused"):
        state["param_groups"][0].pop(key, None)
    optimizer.load_state_dict(state)
    train(model, optimizer, 2)
    assert optimizer.steps == 3


def test_settings_of_a_file_are_checked_together():
    facts = SlowMoConfig(gossip=SGP(topology=[[0.5, 0.5], [0.5, 0.5]])).facts()
    assert parse_config(json.loads(json.dumps(facts)), "model.keras") == SlowMoConfig.from_facts(facts)
    with pytest.raises(CheckpointError, match=r"model.keras has settings that can't be used: .*average=False"):
        parse_config({**SlowMoConfig().facts(), "average": False}, "model.keras")


def test_scalars_in_their_ranges_pass():
    model, optimizer = one()
    train(model, optimizer, 4)
    progress = optimizer.worker.progress
    check_progress(progress, progress)
    check_rates(progress.gamma)
    values = {field: getattr(x, "tolist", lambda x=x: x)() for field, x in progress.flat().items()}
    assert str(parse_progress(values, progress)) == str(progress)


def test_messages_show_control_characters_as_escapes():
    assert escape_controls("a\nb\tc\x1b[2J\u202e\ud800\x85") == "a\nb\tc\\x1b[2J\\u202e\\ud800\\x85"
    for kind in (CheckpointError, CheckpointFileError):
        assert str(kind("\x07")) == "\\x07"


def test_names_in_a_file_do_not_reach_the_terminal_as_they_are(checkpoint, capsys):
    name = "model/\x1b]0;title\x07\n0.linear.weight"

    def rename(raw):
        raw.arrays = {name if key == "anchor/0.linear.weight" else key: x for key, x in raw.arrays.items()}
        raw.ours["facts"]["inner_optimizer"] = "sgd\x1b[8m"

    forge(checkpoint, rename)
    assert main(["inspect", str(checkpoint)]) == 0
    told = capsys.readouterr().out
    assert told.replace("\n", "").isprintable()
    assert r"model/\x1b]0;title\x07\n0.linear.weight" in told
    assert r"inner optimizer sgd\x1b[8m" in told
