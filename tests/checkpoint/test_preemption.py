"""A signal to one worker: all of them save after the same step, and end with one status."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import PREEMPTED, Checkpoints, on_preemption
from support.checkpoints import one, train
from support.problems import Problem
from support.trainings.pytorch import advance, build, held, same

RESET = {"tau": 4, "inner_state": "reset"}
CASES = {
    # settings, and the step after which all end if one worker is asked to after step 5
    "outer steps": (RESET, 8),
    "averaged gradients": ({"tau": None, "gradients": "all", "alpha": 1.0, "beta": 0.0}, 6),
    "both": ({"tau": 4, "gradients": "all"}, 6),
    "warm-up": ({"tau": 4, "warmup_steps": 7}, 6),
    "fragments": ({"tau": 4, "fragments": 2}, 6),
    "gossip in blocks": ({"tau": 3, "gossip": "sgp", "overlap": True}, 6),
    "gossip alone": ({"tau": None, "gossip": "dpsgd", "alpha": 1.0, "beta": 0.0}, 64),
    "a delay": ({"tau": 4, "delay": 1}, 20),  # at the join
}


@pytest.fixture(autouse=True)
def signals():
    """Leave no handler after."""
    yield
    on_preemption(save=None)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_one_workers_wish_ends_all_after_the_same_step(case, tmp_path):
    settings, expected = CASES[case]
    problem = Problem(settings)
    on_preemption(save=tmp_path / "last")

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)

        def epoch():
            for step in range(100 if expected > 20 else 20):
                advance(problem, model, optimizer, comm.rank, range(step, step + 1))
                if comm.rank == 1 and step + 1 == 5:
                    optimizer.worker.roll.wish.set(True)  # a signal reaches the threads of a process alike
            optimizer.join()

        with pytest.raises(SystemExit) as ended:
            epoch()
        return ended.value.code, optimizer.steps, held(model, optimizer)

    first, second = ThreadWorld(2).run(work)
    assert first[:2] == second[:2] == (PREEMPTED, expected)

    def resumed(comm):
        model, optimizer = build(problem, comm, comm.rank)
        optimizer.load(tmp_path / "last")
        return optimizer.steps, held(model, optimizer)

    for (steps, values), (_, _, before) in zip(ThreadWorld(2).run(resumed), (first, second), strict=True):
        assert steps == expected
        common = values.keys() - {"push", "sent"}  # without meaning between two blocks
        assert same({name: values[name] for name in common}, {name: before[name] for name in common})


def test_while_a_worker_is_in_its_join_all_wait_for_its_end(tmp_path):
    problem = Problem(RESET)
    on_preemption(save=tmp_path / "last")

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        for step in range((14, 2)[comm.rank]):
            advance(problem, model, optimizer, comm.rank, range(step, step + 1))
            if comm.rank == 0 and step == 5:
                optimizer.worker.roll.wish.set(True)
        with pytest.raises(SystemExit):
            optimizer.join()
        return optimizer.steps

    assert ThreadWorld(2).run(work) == [14, 14]


def test_a_series_saves_after_its_own_step_with_the_scripts_values(tmp_path):
    model, optimizer = one()
    checkpoints = Checkpoints(tmp_path, every=100)
    on_preemption(save=checkpoints)
    checkpoints.resume(optimizer)
    train(model, optimizer, 2)
    checkpoints.step(taken=2)
    signal.raise_signal(signal.SIGTERM)
    train(model, optimizer, 1)  # the step of the scheduler may follow
    with pytest.raises(SystemExit) as ended:
        checkpoints.step(taken=3)
    assert ended.value.code == PREEMPTED
    again = Checkpoints(tmp_path)
    assert again.resume(one()[1]) == 3
    assert again.values == {"taken": 3}


def test_a_signal_to_a_worker_alone_saves_after_its_step(tmp_path):
    model, optimizer = one()
    on_preemption(save=tmp_path / "last")
    train(model, optimizer, 1)
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as ended:
        train(model, optimizer, 1)
    assert ended.value.code == PREEMPTED
    _, again = one()
    again.load(tmp_path / "last")
    assert again.steps == 2


def test_earlier_handlers_are_called_once_and_restored(tmp_path):
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    own = signal.getsignal(signal.SIGUSR1)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        on_preemption(save=tmp_path / "last", signals=[signal.SIGUSR1, signal.SIGINT])
        on_preemption(save=tmp_path / "other", signals=[signal.SIGUSR1, signal.SIGINT])  # takes the first one's place
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGINT)  # passed on by a launcher: the same wish, and no KeyboardInterrupt
        assert received == [signal.SIGUSR1]
        on_preemption(save=None)
        assert signal.getsignal(signal.SIGUSR1) is own
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_can_not_save_is_refused():
    with pytest.raises(TypeError, match=r"`save` must be a path or Checkpoints. Received: int"):
        on_preemption(save=3)


def test_a_rank_that_has_not_called_it_says_so():
    problem = Problem(RESET)

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        optimizer.worker.roll.wish.set(True)
        with pytest.raises(RuntimeError, match=r"on_preemption\(\) was not called. Call it on every rank"):
            advance(problem, model, optimizer, comm.rank, range(4))

    ThreadWorld(2).run(work)


BUSY = """
import sys, time
import hvd_slowmo.torch as slowmo
slowmo.on_preemption(save="last")
print("ready", flush=True)
"""
FORKED = """
import os, signal, sys, time
from hvd_slowmo.checkpoint.preemption import on_preemption
from hvd_slowmo.core.step import preemption
on_preemption(save="last")
for _ in range(2):
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(3)
    time.sleep(1.2)
    os.kill(child, signal.SIGTERM)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), preemption._current.received)
"""
PLACES = {
    "time.sleep(120)": signal.SIGTERM,
    "__import__('hashlib').pbkdf2_hmac('sha512', b'x', b'y', 10**9)": signal.SIGINT,  # no handler runs meanwhile
}


@pytest.mark.slow
def test_signals_to_forked_processes_end_these_alone():
    job = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False)
    assert job.returncode == 0, job.stderr
    assert job.stdout.splitlines() == [f"{signal.SIGTERM:d} 0.0"] * 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.slow
@pytest.mark.sample("time.sleep(120)")
def test_a_second_signal_ends_a_process_at_once_wherever_it_is(place, tmp_path):
    number, code = PLACES[place], BUSY + place
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as job:
        assert job.stdout.readline() == "ready\n"
        for _ in range(2):  # from a terminal and from a launcher, say
            os.kill(job.pid, number)
            time.sleep(0.2)
        assert job.poll() is None
        time.sleep(1)
        os.kill(job.pid, number)
        assert job.wait(20) == 128 + number
