"""Trouble on one worker while exchanges are in flight: the same error on every worker, or the right result."""

import copy
import re
import time

import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo_torch.tensors.codec import TorchCodec
from support import few_bits
from support.trainings.pytorch import same

LATE = {"delay": 2}
FRAGMENTS = {"fragments": 4, "delay": 3}
SETTINGS = [
    {"bits": bits, "shard": shard, **late} for late in (LATE, FRAGMENTS) for bits in (32, 8) for shard in (False, True)
]
SETTINGS += [{"bits": 8, "shard": shard} for shard in (False, True)]  # blocking
# Workers that are excluded return to the anchors of all fragments, which nobody has whole.
EXCLUDING = [each for each in SETTINGS if not (each["bits"] == 32 and each["shard"] and "fragments" in each)]
FLYING = [each for each in SETTINGS if "delay" in each]


def break_(model):
    with torch.no_grad():
        model.weight[20:30] = float("nan")  # a part of the slices


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("at", range(3, 8))
@pytest.mark.slow
@pytest.mark.sample(every=3)
def test_a_value_that_is_not_finite_raises_on_all_at_one_step(settings, at):
    def work(comm):
        model, optimizer = few_bits.build(comm, **settings)
        try:
            for k in range(16):
                few_bits.step(model, optimizer, comm.rank, k)
                if k == at and comm.rank == 1:
                    break_(model)
        except ValueError as error:
            return k, str(error)
        return None

    results = ThreadWorld(3).run(work)
    assert len({step for step, _ in results}) == 1
    assert all("not finite (NaN or infinity) on rank 1" in words for _, words in results)


@pytest.mark.parametrize("settings", [{"fragments": 4, "delay": 3}, {"fragments": 2, "delay": 4}], ids=str)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("steps", [(8, 5, 9), (5, 3, 5), (4, 7, 6), (9, 9, 3)], ids=str)
@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.slow
def test_nor_does_anybody_wait_where_workers_are_in_a_join(settings, bits, steps, broken):
    """Each learns of it at another step: what one has launched by then all others answer."""

    def work(comm):
        model, optimizer = few_bits.build(comm, bits=bits, **settings)
        for k in range(steps[comm.rank]):
            if k == 3 and comm.rank == broken:
                break_(model)
            few_bits.step(model, optimizer, comm.rank, k)
        if comm.rank == broken:
            break_(model)
        optimizer.join()

    for error in ThreadWorld(3).run(work, return_exceptions=True):
        assert isinstance(error, ValueError)
        assert f"not finite (NaN or infinity) on rank {broken}" in str(error)


@pytest.mark.parametrize("settings", [{}, *FLYING], ids=str)
@pytest.mark.slow
def test_a_script_that_mends_its_model_goes_on(settings):
    """Nothing is in flight any more, and the blocks go on as if nothing had been sent."""

    def work(comm):
        model, optimizer = few_bits.build(comm, **settings)
        seen = []
        for k in range(16):
            if k == 3 and comm.rank == 1:
                break_(model)
            try:
                few_bits.step(model, optimizer, comm.rank, k)
            except ValueError:
                with torch.no_grad():
                    model.weight.nan_to_num_(0.0)
                now = optimizer.worker.progress
                seen.append((now.step, now.since.tolist(), now.rate_steps.tolist(), now.flight.launched.tolist()))
                state = copy.deepcopy(optimizer.state_dict())
                optimizer.load_state_dict(state)  # nor in a state that is saved now
        optimizer.join()
        return copy.deepcopy(model.state_dict()), seen

    results = ThreadWorld(3).run(work)
    assert all(same(model, results[0][0]) for model, _ in results)
    assert bool(results[0][0]["weight"].isfinite().all())
    (step, since, rate_steps, launched), *more = results[1][1]
    assert all(seen == results[1][1] for _, seen in results)
    assert not more
    assert not any(launched)
    if "fragments" not in settings:
        assert since == rate_steps == [step]  # no meeting has been a success
        assert step == 3 + settings.get("delay", 0)


def test_what_has_moved_before_a_failure_is_averaged_after_it():
    """The bias is trained in the block that is sent, and then frozen."""

    def work(comm):
        model, optimizer = few_bits.build(comm, bits=32, delay=2)
        for k in range(12):
            if k == 4:
                model.bias.requires_grad_(False)
            if k == 3 and comm.rank == 1:
                break_(model)
            for p in model.parameters():
                p.grad = p.detach() - few_bits.centre(comm.rank, k, p.shape) if p.requires_grad else None
            try:
                optimizer.step()
            except ValueError:
                assert k == 5
                with torch.no_grad():
                    model.weight.nan_to_num_(0.0)
            if k == 4:
                own = model.bias.detach().clone()
        return own, model.bias.detach().clone()

    (first, mean), (second, other) = ThreadWorld(2).run(work)
    assert not torch.equal(first, second)
    assert torch.equal(mean, other)


@pytest.mark.parametrize("settings", FLYING, ids=str)
@pytest.mark.parametrize("before", range(3, 9))
@pytest.mark.parametrize("elsewhere", ["at an outer step", "in join()"])
@pytest.mark.slow
@pytest.mark.sample(every=3)
def test_averaged_parameters_on_one_worker_is_an_error_on_all(settings, before, elsewhere):
    """The others exchange beside their training, and learn of it later."""

    def work(comm):
        model, optimizer = few_bits.build(comm, **settings)
        for k in range(before):
            few_bits.step(model, optimizer, comm.rank, k)
        if comm.rank == 1:
            with optimizer.averaged_parameters():
                return
        for k in range(before, before + (10 if elsewhere == "at an outer step" else comm.rank)):
            few_bits.step(model, optimizer, comm.rank, k)
        optimizer.join()

    for error in ThreadWorld(3).run(work, return_exceptions=True):
        assert isinstance(error, ValueError)
        assert "rank 1 is in averaged_parameters()" in str(error)
        assert f"rank 0 is {elsewhere}" in str(error)


@pytest.mark.parametrize("settings", EXCLUDING, ids=str)
@pytest.mark.parametrize("at", range(3, 8))
@pytest.mark.slow
@pytest.mark.sample(every=3)
def test_an_excluded_worker_goes_on_with_the_others_values(settings, at):
    def work(comm):
        model, optimizer = few_bits.build(comm, nonfinite="exclude", **settings)
        for k in range(16):
            few_bits.step(model, optimizer, comm.rank, k)
            if k == at and comm.rank == 1:
                break_(model)
        optimizer.join()
        state = few_bits.entry(optimizer)
        kept = [*state["vectors"].values(), *(slices.values() for slices in state["slices"].values())]
        finite = all(bool(x.isfinite().all()) for each in kept for x in each if x is not None)
        return copy.deepcopy(model.state_dict()), int(optimizer.worker.progress.excluded), finite

    results = ThreadWorld(3).run(work)
    assert all(same(model, results[0][0]) for model, _, _ in results)
    assert bool(results[0][0]["weight"].isfinite().all())
    assert [excluded > 0 for _, excluded, _ in results] == [False, True, False]
    assert all(finite for *_, finite in results)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("at", [4, 6])
@pytest.mark.slow
@pytest.mark.sample(every=3)
def test_a_step_that_a_scaler_skips_on_one_worker_is_one_without_gradients(settings, at):
    """The exchange goes on at its time: a block counts steps, skipped ones too."""

    def work(comm, overflows):
        model, optimizer = few_bits.build(comm, **settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for k in range(14):
            optimizer.zero_grad()
            loss = sum((p - few_bits.centre(comm.rank, k, p.shape)).square().sum() / 2 for p in model.parameters())
            if k == at and comm.rank == 1:
                loss = loss * (1e38 if overflows else 0.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.join()
        return copy.deepcopy(model.state_dict()), scaler.get_scale()

    overflowed, expected = (ThreadWorld(3).run(lambda comm, o=o: work(comm, o)) for o in (True, False))
    assert overflowed[1][1] < expected[1][1]
    assert all(same(model, expected[0][0]) for model, _ in [*overflowed, *expected])


class Breaks:
    """A Comm whose second exchange beside the worker ends in an error, before this worker has sent its first chunk."""

    def __init__(self, comm):
        self._comm, self._begun = comm, 0

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def start_beside(self, work):
        self._begun += 1
        return self._comm.start_beside((lambda comm: work(Broken(comm))) if self._begun == 2 else work)


class Broken:
    def __init__(self, comm):
        self._comm = comm

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def start_sum(self, name, x):
        self._refuse(name)
        return self._comm.start_sum(name, x)

    def start_alltoall(self, name, parts):
        self._refuse(name)
        return self._comm.start_alltoall(name, parts)

    def _refuse(self, name):
        if ".model." in name:
            raise MemoryError("no memory in the thread")


@pytest.mark.slow
@pytest.mark.parametrize("settings", FLYING, ids=str)
@pytest.mark.parametrize("where", ["script", "thread"])
def test_an_exception_on_one_worker_ends_all(monkeypatch, settings, where):
    """In its script while a thread encodes, or in the thread itself: where the worker takes the result."""
    slow_down(monkeypatch)

    def work(comm):
        breaks = where == "thread" and comm.rank == 1
        model, optimizer = few_bits.build(Breaks(comm) if breaks else comm, **settings)
        for k in range(5):
            few_bits.step(model, optimizer, comm.rank, k)
        if where == "script" and comm.rank == 1:
            raise MemoryError("no memory in the script")
        for k in range(5, 16):
            few_bits.step(model, optimizer, comm.rank, k)
        optimizer.join()

    results = ThreadWorld(3).run(work, return_exceptions=True)
    assert isinstance(results[1], MemoryError)
    for result in results:
        assert f"no memory in the {where}" in str(result)


def slow_down(monkeypatch):
    """Let threads still encode when the step is over that has started them."""
    encode = TorchCodec.encode

    def slow(codec, *arguments):
        time.sleep(0.02)
        return encode(codec, *arguments)

    monkeypatch.setattr(TorchCodec, "encode", slow)


def broken_worker(settings, where):
    """Raise on rank 1 in flight; return the others' error and the seconds until it came."""
    from hvd_slowmo.torch import rank
    from hvd_slowmo_torch.comm.workers import connect

    breaks = where == "thread" and rank() == 1
    model, optimizer = few_bits.build(Breaks(connect()) if breaks else None, **settings)
    for k in range(4):
        few_bits.step(model, optimizer, rank(), k)
    if where == "script" and rank() == 1:
        raise MemoryError("no memory in the script")
    started = time.monotonic()
    try:
        for k in range(4, 16):
            few_bits.step(model, optimizer, rank(), k)
    except RuntimeError as error:  # of the transport's own class
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "nothing was raised", 0.0


@pytest.mark.workers
@pytest.mark.both_transports
@pytest.mark.parametrize("settings", [{"delay": 2}, {"delay": 2, "bits": 8, "shard": True}], ids=str)
@pytest.mark.parametrize("where", ["script", "thread"])
@pytest.mark.slow
@pytest.mark.sample("horovod.torch-thread-{'delay': 2, 'bits': 8, 'shard': True}")
def test_an_exception_on_one_real_worker_is_a_clear_error_on_the_others(workers, settings, where):
    first, broken, third = workers(3).outcomes(
        "pytorch.test_trouble_in_flight:broken_worker", settings=settings, where=where, fatal=True
    )
    assert f"MemoryError: no memory in the {where}" in str(broken)
    for words, seconds in (first, third):
        # Others may stop first at what a third worker is to send, which waits for the broken one.
        assert re.match(
            r"(HorovodInternalError|DistNetworkError): .* because ranks? 1\b.*look at the output there", words
        )
        assert seconds < 20
