"""What `make setup` does: each stage once, and again after a failure, an interruption or a change."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """tools/setup_venv.py, working on an empty folder, with three stages that note their runs in `ran`."""
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / "tools" / "setup_venv.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses looks the module up by its name
    monkeypatch.setitem(sys.modules, "setup_venv", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "stamp.json")
    monkeypatch.setattr(module, "LOG", tmp_path / ".venv" / "log")
    monkeypatch.setattr(module, "UNFINISHED", tmp_path / ".venv" / "unfinished")
    for name in ("packages.txt", "project.txt"):
        (tmp_path / name).write_text("1")
    module.ran = []
    module.failing = {}

    def stage(name, *inputs):
        def run():
            module.ran.append(name)
            if name == "venv":
                module.PYTHON.parent.mkdir(parents=True, exist_ok=True)
                module.PYTHON.write_text("")
            if name in module.failing:
                raise module.failing[name]

        return module.Stage(name, name, tuple(tmp_path / each for each in inputs), run)

    order = (stage("venv"), stage("packages", "packages.txt"), stage("project", "project.txt"))
    monkeypatch.setattr(module, "stages", lambda: order)

    def call():
        module.ran.clear()
        module.set_up()
        return list(module.ran)

    module.call = call
    return module


def test_a_second_call_does_nothing(tool):
    assert tool.call() == ["venv", "packages", "project"]
    assert tool.call() == []


@pytest.mark.parametrize("problem", [RuntimeError("failed"), KeyboardInterrupt()])
def test_after_a_failure_the_next_call_goes_on_from_there(tool, problem):
    tool.failing["packages"] = problem
    with pytest.raises(type(problem)):
        tool.call()
    tool.failing.clear()
    assert tool.call() == ["packages", "project"]
    assert tool.call() == []


def test_a_failure_of_a_changed_stage_is_not_forgotten(tool, tmp_path):
    tool.call()
    (tmp_path / "packages.txt").write_text("2")
    tool.failing["packages"] = RuntimeError("failed")
    with pytest.raises(RuntimeError):
        tool.call()
    # Back to what was installed before: the failed installation may have left anything.
    (tmp_path / "packages.txt").write_text("1")
    tool.failing.clear()
    assert tool.call() == ["packages", "project"]


def test_a_change_runs_its_stage_and_those_after_it(tool, tmp_path):
    tool.call()
    (tmp_path / "project.txt").write_text("2")
    assert tool.call() == ["project"]
    (tmp_path / "packages.txt").write_text("2")
    assert tool.call() == ["packages", "project"]


@pytest.mark.parametrize("stamp", ["", "[]", json.dumps({"venv": "another"})])
def test_a_broken_or_foreign_stamp_runs_all(tool, stamp):
    tool.call()
    tool.STAMP.write_text(stamp)
    assert tool.call() == ["venv", "packages", "project"]


def test_a_removed_environment_runs_all(tool):
    tool.call()
    tool.PYTHON.unlink()
    assert tool.call() == ["venv", "packages", "project"]


@pytest.mark.slow
def test_packages_left_half_installed_mean_a_new_environment(tool, monkeypatch):
    class Killed(BaseException):
        pass

    def die(command):
        raise Killed

    tool.call()
    monkeypatch.setattr(tool, "cpu_index_answers", lambda: False)
    monkeypatch.setattr(tool, "run_logged", die)
    with pytest.raises(Killed):
        tool.install_packages()
    assert tool.call() == ["venv", "packages", "project"]
    tool.UNFINISHED.touch()
    (tool.VENV / "half").touch()
    tool.create_venv()
    assert not (tool.VENV / "half").exists()
    assert tool.PYTHON.exists()


def test_a_failed_installation_keeps_the_environment(tool, monkeypatch):
    def fail(command):
        raise tool.SetupError("no network")

    tool.call()
    monkeypatch.setattr(tool, "cpu_index_answers", lambda: False)
    monkeypatch.setattr(tool, "run_logged", fail)
    with pytest.raises(tool.SetupError):
        tool.install_packages()
    assert tool.call() == []


def test_a_failed_command_shows_its_errors_and_names_the_log(tool):
    tool.VENV.mkdir()
    with pytest.raises(tool.SetupError, match="ERROR: no such package") as caught:
        tool.run_logged([sys.executable, "-c", "print('noise'); print('ERROR: no such package'); raise SystemExit(1)"])
    assert "noise" not in str(caught.value)
    assert str(tool.LOG) in str(caught.value)


def test_the_real_stages_depend_on_files_that_exist():
    code = "import setup_venv; [path.read_bytes() for stage in setup_venv.stages() for path in stage.inputs]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", check=True)
