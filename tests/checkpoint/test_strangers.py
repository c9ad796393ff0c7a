"""Altered files, states, settings and maps end in a documented error or work, and change nothing when they are refused.

Each case has a seed of its own: `run(area, number)` repeats one.
"""

import copy
import shutil
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from torch import nn

from hvd_slowmo import ParameterMap
from hvd_slowmo.cli.main import main
from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.torch import DPSGD, SGP, SlowMo, SlowMoConfig
from hvd_slowmo.wire.parameter_map import Layer, Part
from hvd_slowmo.wire.views import View
from support.faulty_files import ODD, altered, deepened, forged, is_raised_by_us, odd
from support.inner_optimizers import DAdapt

SEED = 7

SHARES = {
    "load": 0.22,
    "load by two workers": 0.04,
    "inspect": 0.16,
    "convert": 0.14,
    "load_state_dict": 0.2,
    "load_state_dict by two workers": 0.04,
    "settings": 0.08,
    "constructor": 0.04,
    "map": 0.08,
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, amsgrad=True)


TRAININGS = {
    "sgd": (sgd, SlowMoConfig(tau=3)),
    "adam": (adam, SlowMoConfig(tau=2, alpha=0.5, nonfinite="exclude")),
    "gossip": (sgd, SlowMoConfig(tau=4, gossip=SGP(overlap=True))),
    "own values": (DAdapt, SlowMoConfig(tau=3, inner_state="reset")),
}
STREAMED = (adam, SlowMoConfig(tau=3, bits=8, fragments=2, delay=1, shard=True))


def make(training, comm=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    inner, config = training
    return model, SlowMo(inner(model.parameters()), model, config, comm=comm or SoloComm())


def train(model, optimizer, steps):
    for k in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(k))).square().mean().backward()
        optimizer.step()


def values(model, optimizer):
    state = optimizer.state_dict()
    return copy.deepcopy([model.state_dict(), state["state"], state["param_groups"], state["slowmo"]])


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


class Cases:
    """Sources that are whole, and a function per area that runs one case.

    Each returns "refused" or "accepted", and raises AssertionError, or the undocumented error, with the fault.
    """

    def __init__(self, folder):
        self.folder = folder
        self.whole = folder / "whole"
        self.whole.mkdir()
        self.states, self.present = {}, {}
        for name, training in TRAININGS.items():
            model, optimizer = make(training)
            train(model, optimizer, 5)
            optimizer.save(self.whole / name)
            self.states[name] = optimizer.state_dict()
            self.begin(name)
        self.streamed = ThreadWorld(2).run(self.save_streamed)
        (folder / "strange_models.py").write_text(MODELS)

    def begin(self, name):
        model, optimizer = make(TRAININGS[name])
        train(model, optimizer, 2)
        self.present[name] = model, optimizer, values(model, optimizer)

    def save_streamed(self, comm):
        model, optimizer = make(STREAMED, comm)
        train(model, optimizer, 4)
        optimizer.save(self.whole / "two workers")
        return copy.deepcopy(optimizer.state_dict())

    def load(self, rng):
        name = [*TRAININGS][rng.integers(len(TRAININGS))]
        data, fault = forged(self.whole / name, rng)
        path = self.folder / "altered"
        path.write_bytes(data)
        return self.tried(name, fault, lambda optimizer: optimizer.load(path))

    def load_state_dict(self, rng):
        name = [*TRAININGS][rng.integers(len(TRAININGS))]
        state, fault = altered_state(self.states[name], rng)
        return self.tried(name, fault, lambda optimizer: optimizer.load_state_dict(state))

    def tried(self, name, fault, load):
        model, optimizer, before = self.present[name]
        try:
            load(optimizer)
        except (CheckpointError, TypeError) as error:
            check_refusal(error, fault)
            assert equal(values(model, optimizer), before), f"changed: {fault}"
            return "refused"
        check_training(model, optimizer, fault)
        self.begin(name)
        return "accepted"

    def load_by_two_workers(self, rng):
        folder = self.folder / "two"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.whole, folder)
        files = sorted(folder.glob("two workers*"))
        file = files[rng.integers(len(files))]
        data, fault = forged(file, rng)
        file.write_bytes(data)
        return self.tried_by_two(fault, lambda optimizer, rank: optimizer.load(folder / "two workers"))

    def load_state_dict_by_two_workers(self, rng):
        rank = int(rng.integers(2))
        states = list(self.streamed)
        states[rank], fault = altered_state(states[rank], rng)
        return self.tried_by_two(fault, lambda optimizer, rank: optimizer.load_state_dict(states[rank]))

    def tried_by_two(self, fault, load):
        def work(comm):
            model, optimizer = make(STREAMED, comm)
            before, refused = values(model, optimizer), False
            try:
                load(optimizer, comm.rank)
            except (CheckpointError, TypeError) as error:
                refused = True
                check_refusal(error, fault)
                assert equal(values(model, optimizer), before), f"changed: {fault}"
            if any(comm.gather("refused", refused)):
                return "refused"
            check_training(model, optimizer, fault)
            return "accepted"

        return ThreadWorld(2).run(work)[0]

    def inspect(self, rng):
        names = sorted(file.name for file in self.whole.iterdir())
        folder = self.folder / "inspected"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.whole, folder)
        name = names[rng.integers(len(names))]
        data, fault = forged(folder / name, rng)
        (folder / name).write_bytes(data)
        common = "two workers" if name.startswith("two") and rng.random() < 0.5 else name
        return command(["inspect", str(folder / common)], fault)

    def convert(self, rng):
        kind = ("checkpoint", "checkpoint", "plain", "pt")[rng.integers(4)]
        source, target = self.folder / f"source.{kind}", self.folder / "target.safetensors"
        target.unlink(missing_ok=True)
        if kind == "checkpoint":
            data, fault = forged(self.whole / "sgd", rng)
        else:
            data, fault = self.altered_weights(kind, rng)
            source = source.with_suffix(".safetensors" if kind == "plain" else ".pt")
        source.write_bytes(data)
        options = ["--torch", "strange_models:model"] if kind != "checkpoint" or rng.random() < 0.5 else []
        outcome = command(["convert", str(source), str(target), *options], fault)
        assert target.exists() == (outcome == "accepted"), fault
        return outcome

    def altered_weights(self, kind, rng):
        path = self.folder / f"weights.{kind}"
        if not path.exists():
            model, _, _ = self.present["sgd"]
            torch.save(model.state_dict(), path) if kind == "pt" else save_plain(model.state_dict(), path)
        if kind == "pt" and rng.random() < 0.7:
            state, fault = altered(dict(torch.load(path)), rng)
            torch.save(state, self.folder / "altered.pt")
            return (self.folder / "altered.pt").read_bytes(), fault
        data = bytearray(path.read_bytes())
        at = int(rng.integers(min(len(data), 700)))
        data[at] = int(rng.integers(256))
        return bytes(data) if rng.random() < 0.8 else bytes(data[:at]), f"{kind} at {at}"

    def settings(self, rng):
        names = [*SlowMoConfig().facts()]
        chosen = {names[n]: strange(rng) for n in rng.integers(len(names), size=int(rng.integers(1, 4)))}
        if rng.random() < 0.3:
            method = (SGP, DPSGD)[rng.integers(2)]
            return refused_or_not(lambda: method(topology=strange(rng)), chosen)
        return refused_or_not(lambda: SlowMoConfig(**chosen), chosen)

    def constructor(self, rng):
        model = nn.Linear(2, 1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        given = {"inner_optimizer": inner, "model": model, "config": SlowMoConfig(tau=2)}
        options = ("inner_optimizer", "model", "config", "name", "metrics", "parameter_map", "statistics", "transport")
        name = options[rng.integers(len(options))]
        return refused_or_not(lambda: SlowMo(**{"comm": SoloComm(), **given, name: strange(rng)}), name)

    def map(self, rng):
        kind = rng.integers(3)
        if kind == 0:
            fields = {"own": (4, 6), "shape": (2, 2, 6), "axes": (2, 1, 0), "wire": (6, 4), "part": None}
            name = [*fields][rng.integers(5)]
            fields[name] = strange(rng) if rng.random() < 0.5 else tuple(rng.integers(-1, 5, size=3).tolist())
            return refused_or_not(lambda: View(**fields), fields)
        whole = [{"a.*": "b/*", "scale": "s/scale"}, {"head/kernel": (2, 2, 1)}, ["count", "*.steps"]]
        arguments, fault = altered(whole, rng)
        arguments = deepened(arguments)
        if not isinstance(arguments, list) or len(arguments) != 3:
            arguments = [arguments, strange(rng), strange(rng)]

        def arrange():
            layers = [
                Layer("head", "linear", (part("head/kernel", (4, 3), features=(2, 2, 1)), part("head/bias", (3,)))),
                Layer("b/x", "linear", (part("b/x/kernel", (3, 3)),)),
                Layer("s", "scale", (part("s/scale", (3,)), part("count", (), role="statistic"))),
            ]
            return ParameterMap(*arguments).arrange(layers, "keras")

        return refused_or_not(arrange, fault)


MODELS = """
from torch import nn

def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
"""


def part(own, shape, role="parameter", features=None):
    return Part(own.rsplit("/", 1)[-1], role, "float32", own, View.same(shape), features=features)


def save_plain(state, path):
    from safetensors.torch import save_file

    save_file({name: x for name, x in state.items() if x.is_floating_point()}, path)


class Hostile:
    """An object that raises whatever is asked of it."""

    def __getattr__(self, name):
        raise KeyError(name)

    def __eq__(self, other):
        raise ArithmeticError

    __hash__ = None

    def __repr__(self):
        raise LookupError


def strange(rng):
    """Return an odd value, as a script may give one by mistake."""
    others = [
        Hostile(),
        object(),
        np.array([1, 2]),
        np.array(8),
        np.int64(3),
        torch.ones(2),
        int,
        [1.5],
        (1, "2"),
        b"8",
    ]
    number = int(rng.integers(len(ODD) + len(others)))
    return deepened(odd(rng)) if number < len(ODD) else others[number - len(ODD)]


def altered_state(state, rng):
    """Return a state_dict with a fault; most are in SlowMo's own entry."""
    if rng.random() < 0.6:
        entry, fault = altered(state["slowmo"], rng)
        return {**state, "slowmo": deepened(entry)}, f"slowmo: {fault}"
    found, fault = altered(state, rng)
    return deepened(found), fault


def refused_or_not(make, fault):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make()
    except (TypeError, ValueError) as error:
        check_is_ours(error, fault)
        return "refused"
    return "accepted"


def check_is_ours(error, fault):
    assert is_raised_by_us(error), f"{fault}: {error!r}"


def check_refusal(error, fault):
    check_is_ours(error, fault)
    assert isinstance(error, CheckpointError) or "`state_dict` must be a dict" in str(error), fault
    assert str(error).replace("\n", "").replace("\t", "").isprintable(), fault


def check_training(model, optimizer, fault):
    """Train with what was accepted: it may end in values that are not finite, which is a documented error."""
    try:
        train(model, optimizer, 5)
    except (ValueError, RuntimeError) as error:
        check_is_ours(error, f"accepted: {fault}")


def command(arguments, fault):
    """Run the command line; all that reaches the terminal is printable."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(arguments)
    shown = out.getvalue() + err.getvalue()
    assert shown.replace("\n", "").replace("\t", "").isprintable(), fault
    assert status in (0, 1), fault
    assert (status == 1) == err.getvalue().startswith(f"hvd-slowmo {arguments[0]}: "), fault
    return "refused" if status else "accepted"


def run(cases, area, number):
    """Run one case; return the outcome, or the fault that it has found."""
    rng = np.random.default_rng([SEED, list(SHARES).index(area), number])
    try:
        return getattr(cases, area.replace(" ", "_"))(rng), None
    except Exception as error:
        return "fault", f"{area} {number}: {type(error).__name__}: {str(error)[:200]}"


def run_all(folder, total):
    """Return the outcomes by area, and the faults."""
    cases = Cases(folder)
    outcomes, faults = {area: Counter() for area in SHARES}, []
    for area, share in SHARES.items():
        for number in range(round(share * total)):
            outcome, fault = run(cases, area, number)
            outcomes[area][outcome] += 1
            faults += [fault] if fault else []
    return outcomes, faults


@pytest.mark.slow
@pytest.mark.parametrize("total", [150, pytest.param(10_000, marks=pytest.mark.thorough)])
def test_altered_input_is_refused_by_a_documented_error_or_works(total, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    outcomes, faults = run_all(tmp_path, total)
    assert not faults, "\n".join(faults[:50])
    assert sum(outcome.total() for outcome in outcomes.values()) == total
    for area, outcome in outcomes.items():
        assert outcome["refused"] > 0.2 * outcome.total(), f"{area}: {outcome}"
    assert sum(outcome["accepted"] for outcome in outcomes.values()) > 0.05 * total, "some faults are harmless"
