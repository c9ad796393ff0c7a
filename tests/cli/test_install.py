"""`hvd-slowmo install-horovod` and `doctor` without a framework, and the command's help."""

import pytest

from hvd_slowmo.cli.main import main
from support.installation import ROOT, run_code


def _without_frameworks(*arguments, cache):
    code = f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "tensorflow", "keras"):
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent())
        from hvd_slowmo.cli.main import main
        sys.exit(main({list(arguments)!r}))
    """
    return run_code(code, PYTHONPATH=str(ROOT), XDG_CACHE_HOME=str(cache))


@pytest.mark.slow
def test_install_horovod_without_a_framework_says_so_and_fails(tmp_path):
    result = _without_frameworks("install-horovod", cache=tmp_path)
    assert result.returncode == 1
    assert "has neither" in result.stderr
    assert "Fix: install the framework first" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_doctor_without_a_framework_says_so_and_fails(tmp_path):
    result = _without_frameworks("doctor", cache=tmp_path)
    assert result.returncode == 1
    assert "problem  Neither PyTorch nor TensorFlow is installed" in result.stdout
    assert "Training would not work here" in result.stdout


def test_the_command_line_helps(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == "hvd-slowmo 0.1.0\n"
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert "install-horovod" in out
    assert "doctor" in out
    with pytest.raises(SystemExit, match="2"):
        main(["install-horovod", "--jobs", "0"])
    assert "positive integer" in capsys.readouterr().err
