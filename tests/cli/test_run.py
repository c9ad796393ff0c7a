"""`hvd-slowmo run`: output, exit status and signals. The workers use no framework."""

import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest

from hvd_slowmo.cli import workers
from hvd_slowmo.cli.output import SECONDS_BETWEEN_STATES, LastError, LineReader
from hvd_slowmo.cli.run import _status
from hvd_slowmo.cli.workers import Job
from support.installation import ROOT

RUN = [sys.executable, "-m", "hvd_slowmo.cli.main", "run"]


def started(folder, script, *options):
    """Start two workers without the virtual environment in PATH."""
    (folder / "train.py").write_text(textwrap.dedent(script))
    paths = os.pathsep.join(map(str, (folder / "modules", ROOT, ROOT / "torch", ROOT / "tf")))
    env = {**os.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": paths, "HOME": str(folder)}
    command = [*RUN, "-np", "2", *options, "python", "train.py"]
    return subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def test_a_progress_bar_is_shown_now_and_then_and_at_its_end():
    now, lines = [0.0], []
    reader = LineReader(lines.append, clock=lambda: now[0])
    for percent in range(101):
        reader.feed(f"\r{percent} %")
        now[0] += SECONDS_BETWEEN_STATES / 40
    assert lines == ["0 %", "40 %", "80 %"]
    reader.feed("\nepoch 1\r\n\nloss: ")
    assert lines[3:] == ["100 %", "epoch 1", ""]
    reader.feed("0.5\rover\r")
    reader.close()
    assert lines[6:] == ["loss: 0.5", "over"]


def test_the_error_is_the_last_traceback_with_its_causes():
    error = LastError()
    first = ["Traceback (most recent call last):", "KeyError: 1", ""]
    chained = [*first, "During handling of the above exception, another exception occurred:", ""]
    last = ["Traceback (most recent call last):", "  File", "ValueError: no"]
    for line in [*first, "a warning", *chained, *last]:
        error.add(line)
    assert error.lines() == [*chained, *last]
    assert not error.consequence
    error.add("HorovodInternalError: Horovod has been shut down.")
    assert error.consequence
    plain = LastError()
    for number in range(30):
        plain.add(str(number))
    assert plain.lines() == [str(number) for number in range(10, 30)]


def test_the_status_of_a_signal_and_the_output_of_a_worker(capsys):
    job = Job(elastic=False)
    assert job.execute("echo hello; echo oops >&2; kill -9 $$", index=3) == 0
    assert job.failure.status == 128 + signal.SIGKILL
    assert capsys.readouterr() == ("[3] hello\n", "[3] oops\n")
    assert Job(elastic=True).execute("exit 4", index=0) == 4


def test_a_process_that_a_worker_leaves_behind_is_not_waited_for(capsys):
    """It holds the worker's output. The other workers end as after any failure."""
    job = Job(elastic=False)
    commands = ["setsid sleep 60 & sleep 0.2; echo last words; exit 3", "exec sleep 60"]
    threads = [threading.Thread(target=job.execute, args=each[::-1]) for each in enumerate(commands)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert [(worker.rank, worker.status) for worker in job.ended] == [(0, 3), (1, 128 + signal.SIGTERM)]
    assert capsys.readouterr().out == "[0] last words\n"


@pytest.mark.slow
@pytest.mark.workers
def test_the_cause_comes_last_and_gives_the_status_and_the_launcher_imports_no_framework(tmp_path):
    for name in ("torch", "tensorflow", "mxnet"):
        (tmp_path / "modules" / name).mkdir(parents=True)
        (tmp_path / "modules" / name / "__init__.py").write_text(f"open('{tmp_path}/imported', 'w')")
    script = """
        import os, sys, time
        print(sys.prefix)
        if os.environ["HOROVOD_RANK"] == "0":
            while not os.path.exists("started"):
                time.sleep(0.05)
            raise RuntimeError("HorovodInternalError: a peer has ended")
        open("started", "w").close()
        time.sleep(0.5)
        try:
            raise ValueError("the cause")
        except ValueError:
            sys.excepthook(*sys.exc_info())
            sys.exit(7)
    """
    process = started(tmp_path, script, "--")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert sorted(out.splitlines()) == [f"[{rank}] {sys.prefix}" for rank in (0, 1)]
    _, *last = err.partition("hvd-slowmo run: rank 1 ended with exit status 7; the end of its error output:")[
        2
    ].splitlines()
    assert last[0] == "Traceback (most recent call last):"
    assert last[-1] == "ValueError: the cause"
    assert "horovod/runner" not in err
    assert not (tmp_path / "imported").exists()


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.parametrize(
    ("number", "statuses", "expected"),
    [(signal.SIGINT, (0, 75), 130), (signal.SIGTERM, (75, 75), 75)],
    ids=["one has ended otherwise", "all have saved"],
)
def test_signals_reach_the_workers(tmp_path, number, statuses, expected):
    script = """
        import os, signal, sys, time
        def end(number, frame):
            print("got", signal.Signals(number).name)
            sys.exit(STATUSES[int(os.environ["HOROVOD_RANK"])])
        signal.signal(signal.SIGINT, end)
        signal.signal(signal.SIGTERM, end)
        print("ready")
        time.sleep(60)
    """
    process = started(tmp_path, script.replace("STATUSES", str(statuses)))
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert err == f"hvd-slowmo run: ended by {number.name}\n"
    assert sorted(out.splitlines()) == [f"[{rank}] got {number.name}" for rank in (0, 1)]
    assert process.returncode == expected


def test_a_job_that_has_lost_a_worker_before_is_resumed_where_all_others_have_saved():
    job = Job(elastic=True)
    job.ended = [SimpleNamespace(status=137, stopped=False), SimpleNamespace(status=75, stopped=True)]
    job.received = signal.SIGTERM
    assert _status(job) == 75
    job.ended.append(SimpleNamespace(status=0, stopped=True))
    assert _status(job) == 128 + signal.SIGTERM


def test_a_signal_leaves_time_to_save_and_a_failure_less(monkeypatch):
    """Workers that go on after SIGTERM are killed: those of a job that a signal ends later than those of a failure."""
    delays, sent, now = [], [], [100.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Job, "_later", lambda job, seconds, number: delays.append((seconds, number)))
    job = Job(elastic=False)
    job._running.append(SimpleNamespace(send=sent.append))
    job.pass_on(signal.SIGTERM)
    job._stop(signal.SIGTERM)
    now[0] += 0.5
    job.pass_on(signal.SIGTERM)  # the same one: the terminal has sent it to the launcher's own launcher too
    now[0] += 1.0
    job.pass_on(signal.SIGINT)
    assert sent == [signal.SIGTERM, signal.SIGTERM, signal.SIGKILL]
    assert job.received == signal.SIGINT
    assert delays == [(workers.SECONDS_TO_SAVE, signal.SIGKILL), (workers.SECONDS_TO_END, signal.SIGKILL)]


def test_a_worker_that_goes_on_after_a_signal_is_killed(monkeypatch, capfd):
    monkeypatch.setattr(workers, "SECONDS_TO_SAVE", 0.2)
    job = Job(elastic=False)
    thread = threading.Thread(target=job.execute, args=("trap '' TERM; echo ready; sleep 60 & wait; wait", 0))
    thread.start()
    while "ready" not in capfd.readouterr().out:
        time.sleep(0.01)
    job.pass_on(signal.SIGTERM)
    thread.join(20)
    assert not thread.is_alive()
    assert [worker.status for worker in job.ended] == [128 + signal.SIGKILL]


@pytest.mark.slow
@pytest.mark.workers
def test_output_that_nobody_reads_ends_the_job(tmp_path):
    """Of `head`, say."""
    process = started(tmp_path, "import time\nwhile True:\n    print('on')\n    time.sleep(0.1)")
    with process:
        process.stdout.readline()
        process.stdout.close()
        assert sorted(process.stderr) == ["[0] Terminated\n", "[1] Terminated\n"]
        assert process.wait(60) == 128 + signal.SIGPIPE


@pytest.mark.slow
@pytest.mark.workers
def test_a_killed_launcher_leaves_no_worker(tmp_path):
    script = """
        import time
        held = open("alive", "w")
        print("ready")
        time.sleep(60)
    """
    os.mkfifo(tmp_path / "alive")
    alive = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    process = started(tmp_path, script)
    for _ in range(2):
        process.stdout.readline()
    process.kill()
    process.communicate(timeout=60)
    assert select.select([alive], [], [], 30)[0]
    assert os.read(alive, 1) == b"", "the workers' end is closed"
    os.close(alive)


@pytest.mark.slow
@pytest.mark.workers
def test_refusals_of_horovods_launcher_are_one_line(tmp_path):
    for options, status, message in (
        ((), 1, "hvd-slowmo run: ValueError: Requested more processes (2) than there are available slots (1)"),
        (("--such",), 2, "hvd-slowmo run: error: "),
    ):
        process = started(tmp_path, "", "-H", "localhost:1", *options)
        _, err = process.communicate(timeout=60)
        assert process.returncode == status
        assert err.splitlines()[-1].startswith(message)
        assert "Traceback" not in err
