"""The set-up by make with stubs for Python, pip and the installer: each step runs once, and again after a failure."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["venv", "packages", "checkout", "horovod"]

# Replaces Python, outside and inside .venv, and pip and hvd-slowmo. It records the steps in the file `ran`. The files
# `fail-STEP` and `hang-STEP` make a step fail or hang; `slow` makes pip take a second.
STUB = """#!/bin/sh
step() {
    echo "$1" >> ran
    if [ -e "fail-$1" ]; then echo "Collecting noise"; echo "ERROR: no such package"; exit 1; fi
    if [ -e "hang-$1" ]; then touch hanging; sleep 60; fi
}
case "$*" in
    *install-horovod) step horovod ;;
    "-m venv .venv")
        mkdir -p .venv/bin
        step venv
        cp "$0" .venv/bin/python
        ;;
    *--editable*)
        step checkout
        cp "$0" .venv/bin/hvd-slowmo
        ;;
    *requirements-*.txt)
        step packages
        echo "$*" | sed 's/.* //' >> installed
        [ ! -e slow ] || { touch installing; sleep 1; }
        ;;
    *urlopen*) exit 1 ;;
    "-S -c "*) echo "IDENTITY in $PWD" ;;
    "--version") echo "IDENTITY" ;;
esac
"""


def _heed_interrupts():
    # A shell starts background jobs with SIGINT ignored, which would be inherited down to make.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Checkout:
    """A copy of the files that `make setup` reads, with the stubs `python3` and `python4`."""

    def __init__(self, folder):
        self.folder = folder
        requirements = [path.name for path in ROOT.glob("requirements-*.txt")]
        for name in ("Makefile", *requirements, "setup.py", "pyproject.toml", "hvd_slowmo/version.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
            os.utime(folder / name, (0, 0))
        (folder / "hvd_slowmo" / "installer").mkdir()
        (folder / "hvd_slowmo" / "installer" / "build.py").touch()
        os.utime(folder / "hvd_slowmo" / "installer" / "build.py", (0, 0))
        for name in ("python3", "python4"):
            stub = folder / "stubs" / name
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(STUB.replace("IDENTITY", f"Stub {name}"))
            stub.chmod(0o755)

    def start(self, *arguments, target="setup", path=os.environ["PATH"]):
        # Hide the make that may run these tests, and the Python that it was told to use.
        dropped = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON")
        environment = {key: value for key, value in os.environ.items() if key not in dropped}
        environment["PATH"] = f"{self.folder / 'stubs'}:{path}"
        return subprocess.Popen(
            ["make", target, *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )

    def setup(self, *arguments, status=0, **options):
        """Run make and return the steps and the output."""
        (self.folder / "ran").write_text("")
        process = self.start(*arguments, **options)
        said, _ = process.communicate(timeout=60)
        assert (process.returncode != 0) == (status != 0), said
        return self.ran(), said

    def demo(self, framework):
        """Prepare a demo; return the steps, and the file of requirements that was installed, if any."""
        (self.folder / "installed").write_text("")
        ran, _ = self.setup(f"FRAMEWORK={framework}", target="setup-demo")
        return ran, (self.folder / "installed").read_text().strip()

    def ran(self):
        return (self.folder / "ran").read_text().split()

    def wait_for(self, name):
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def mark(self, name):
        (self.folder / name).touch()

    def unmark(self, name):
        (self.folder / name).unlink()

    def change(self, name):
        """Make a file newer than every stamp."""
        time.sleep(0.02)  # the clock of the file system is coarse
        (self.folder / name).touch()


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_a_second_call_does_nothing(checkout):
    ran, said = checkout.setup()
    assert ran == STEPS
    assert said.count("done in") == 3  # the installer reports its own time
    assert checkout.setup() == ([], "")


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_failed_step_leaves_no_stamp_and_is_repeated(checkout, step):
    checkout.mark(f"fail-{step}")
    ran, _ = checkout.setup(status=2)
    assert ran[-1] == step
    name = "python" if step == "venv" else step
    assert not (checkout.folder / ".venv" / f".{name}").exists()
    checkout.unmark(f"fail-{step}")
    assert checkout.setup()[0] == STEPS[STEPS.index(step) :]
    assert checkout.setup()[0] == []


def test_a_failure_of_pip_shows_its_errors_and_names_the_log(checkout):
    checkout.mark("fail-packages")
    _, said = checkout.setup(status=2)
    assert "ERROR: no such package" in said
    assert "noise" not in said
    log = checkout.folder / ".venv" / "packages.log"
    assert str(log) in said
    assert "noise" in log.read_text()


def test_a_failure_after_a_change_is_repeated_even_if_the_change_is_undone(checkout):
    checkout.setup()
    checkout.change("requirements-dev.txt")
    checkout.mark("fail-packages")
    checkout.setup(status=2)
    os.utime(checkout.folder / "requirements-dev.txt", (0, 0))
    checkout.unmark("fail-packages")
    assert checkout.setup()[0] == ["packages", "checkout", "horovod"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("step", ["venv", "packages", "checkout"])
@pytest.mark.sample(every=2)
def test_an_interrupted_step_is_repeated_in_a_new_environment(checkout, step, number):
    checkout.mark(f"hang-{step}")
    process = checkout.start()
    checkout.wait_for("hanging")
    os.killpg(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    checkout.unmark(f"hang-{step}")
    (checkout.folder / ".venv" / "half-installed").touch()
    assert checkout.setup()[0] == STEPS
    assert not (checkout.folder / ".venv" / "half-installed").exists()
    assert checkout.setup()[0] == []


def test_an_interrupted_installation_of_horovod_is_repeated_without_its_remains(checkout):
    checkout.mark("hang-horovod")
    process = checkout.start()
    checkout.wait_for("hanging")
    half = checkout.folder / ".venv" / "lib" / "python3.0" / "site-packages" / "horovod"
    half.mkdir(parents=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    checkout.unmark("hang-horovod")
    assert checkout.setup()[0] == ["horovod"]  # the packages are kept
    assert not half.exists()
    assert checkout.setup()[0] == []


def test_without_flock_it_says_so_and_does_nothing(checkout):
    tools = checkout.folder / "tools-without-flock"
    tools.mkdir()
    for name in ("make", "sh"):
        (tools / name).symlink_to(shutil.which(name))
    ran, said = checkout.setup(path=str(tools), status=2)
    assert ran == []
    assert "flock is missing" in said
    assert not (checkout.folder / ".venv").exists()


@pytest.mark.slow
def test_of_two_calls_at_once_one_waits_and_finds_nothing_to_do(checkout):
    checkout.mark("slow")
    processes = [checkout.start() for _ in range(2)]
    outputs = sorted((process.communicate(timeout=60)[0] for process in processes), key=len)
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == "Another make is setting up .venv; waiting for it\n"
    assert checkout.ran() == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "steps"),
    [
        ("requirements-dev.txt", ["packages", "checkout", "horovod"]),
        ("setup.py", ["checkout"]),
        ("hvd_slowmo/installer/build.py", ["horovod"]),
    ],
)
def test_a_change_repeats_the_steps_that_depend_on_it(checkout, changed, steps):
    checkout.setup()
    checkout.change(changed)
    assert checkout.setup()[0] == steps
    assert checkout.setup()[0] == []


@pytest.mark.slow
def test_a_file_that_is_edited_while_its_step_runs_is_not_missed(checkout):
    checkout.mark("slow")
    process = checkout.start()
    checkout.wait_for("installing")
    checkout.change("requirements-dev.txt")
    process.communicate(timeout=60)
    assert checkout.ran() == STEPS
    assert checkout.setup()[0] == ["packages", "checkout", "horovod"]


@pytest.mark.slow
def test_another_python_makes_a_new_environment_which_later_calls_keep(checkout):
    checkout.setup()
    assert checkout.setup("PYTHON=python4")[0] == STEPS
    assert checkout.setup("PYTHON=python4")[0] == []
    assert checkout.setup()[0] == []
    assert checkout.setup("PYTHON=python3")[0] == STEPS


@pytest.mark.slow
def test_a_moved_or_broken_environment_is_recreated(checkout):
    checkout.setup()
    (checkout.folder / ".venv" / "bin" / "python").unlink()
    assert checkout.setup()[0] == STEPS
    moved = checkout.folder.with_name("moved")
    checkout.folder = checkout.folder.rename(moved)
    assert checkout.setup()[0] == STEPS


@pytest.mark.slow
def test_a_demo_installs_its_framework_alone_and_the_tests_add_the_other(checkout):
    assert checkout.demo("torch") == (STEPS, "requirements-torch.txt")
    assert checkout.demo("torch") == ([], "")
    assert checkout.demo("tf") == (["packages", "checkout", "horovod"], "requirements-tf.txt")
    assert checkout.demo("torch") == ([], "")
    assert checkout.setup()[0] == ["packages", "checkout", "horovod"]
    assert checkout.demo("tf") == ([], "")
    checkout.change("requirements-tf.txt")
    assert checkout.demo("torch") == (["packages", "checkout", "horovod"], "requirements-dev.txt")


def test_a_demo_with_an_unknown_framework_installs_nothing(checkout):
    ran, said = checkout.setup("FRAMEWORK=jax", target="setup-demo", status=2)
    assert ran == []
    assert 'FRAMEWORK is "jax"; it must be torch or tf' in said
