"""Download, patch, build and install sources that take a second to build, and test each step alone."""

import hashlib
import io
import json
import os
import tarfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hvd_slowmo.installer import cache as caches
from hvd_slowmo.installer import install, pip, process, recipe, repairs, sdist
from hvd_slowmo.installer.build import build_environment
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.options import Options, passed_on
from hvd_slowmo.installer.patches import Patch
from support.installation import TENSORFLOW, TORCH, Recorder

# The sources


def test_an_archive_with_another_checksum_is_refused(tmp_path, reporter, fake_python):
    kept = tmp_path / "horovod-0.28.1.tar.gz"
    kept.write_bytes(b"something else")
    with pytest.raises(InstallError, match="checksum") as caught:
        sdist.fetch(sdist.HOROVOD, tmp_path, tmp_path, {}, pip.Pip(tmp_path / "log", str(fake_python.path)), reporter)
    assert str(kept) in caught.value.fix
    assert fake_python.calls == []


def test_a_download_that_fails_names_cause_fix_and_log(tmp_path, reporter, fake_python):
    fake_python.write(status=1, says="ERROR: Could not find a version that satisfies the requirement horovod")
    log = tmp_path / "logs" / "pip.log"
    with pytest.raises(InstallError, match="ERROR: Could not find a version") as caught:
        sdist.fetch(sdist.HOROVOD, tmp_path / "sdist", tmp_path, {}, pip.Pip(log, str(fake_python.path)), reporter)
    assert f"put it into {tmp_path / 'sdist'}" in caught.value.fix
    assert f"Full log: {log}" in str(caught.value)
    assert not (tmp_path / "sdist").exists()


def test_a_download_of_something_else_is_not_kept(tmp_path, reporter, fake_python):
    (tmp_path / sdist.HOROVOD.filename).write_bytes(b"not Horovod")  # as if pip had downloaded it
    with pytest.raises(InstallError, match="checksum"):
        sdist.fetch(
            sdist.HOROVOD, tmp_path / "sdist", tmp_path, {}, pip.Pip(tmp_path / "l", str(fake_python.path)), reporter
        )
    assert not (tmp_path / "sdist").exists()


@pytest.mark.parametrize("name", ["../outside", "fake-1/../../outside", "/outside", "elsewhere/file"])
def test_an_archive_that_would_write_outside_is_refused(tmp_path, name):
    archive = tmp_path / "fake-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(InstallError, match="may not be unpacked"):
        sdist.unpack(sdist.Sdist("fake", "1", ""), archive, tmp_path / "to")
    assert not (tmp_path / "outside").exists()


# The build


def test_the_build_gets_its_own_settings_and_not_those_of_an_outer_make(tmp_path):
    env = {
        "PATH": "/bin",
        "MAKEFLAGS": "w",
        "HOROVOD_WITHOUT_GLOO": "1",
        "HOROVOD_BUILD_CUDA_CC_LIST": "90",
        "CXX": "g++",
    }
    got = build_environment(tmp_path, env, (TENSORFLOW,), Options(nccl=True, jobs=3))
    assert got["MAKEFLAGS"] == "-j3"
    assert "HOROVOD_WITHOUT_GLOO" not in got
    assert got["HOROVOD_WITH_GLOO"] == got["HOROVOD_WITH_TENSORFLOW"] == got["HOROVOD_WITHOUT_PYTORCH"] == "1"
    assert "HOROVOD_WITH_PYTORCH" not in got
    assert "HOROVOD_WITHOUT_TENSORFLOW" not in got
    assert got["HOROVOD_WITHOUT_MPI"] == "1"
    assert got["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert got["HOROVOD_BUILD_CUDA_CC_LIST"] == "90"
    assert got["PATH"].startswith(f"{tmp_path / 'bin'}:")
    assert got[repairs.CXX_STANDARD] == "17"
    newer = (replace(TORCH, cxx=20), TENSORFLOW)
    assert build_environment(tmp_path, env, newer, Options())[repairs.CXX_STANDARD] == "20"
    assert passed_on(env) == {"CXX": "g++", "HOROVOD_BUILD_CUDA_CC_LIST": "90"}


GOOD_SETUP = """
    import os, setuptools
    assert os.environ["HOROVOD_WITH_PYTORCH"] == "1"
    print("[  1%] Building CXX object third_party/gloo/gloo/CMakeFiles/gloo.dir/algorithm.cc.o")
    print("[ 50%] Built target gloo")
    setuptools.setup(name="horovod", version="9.9", packages=["horovod", "horovod.torch"],
                     package_data={"horovod.torch": ["*.so"]}, install_requires=["cloudpickle"],
                     extras_require={"dev": ["mock"]})
"""


class Workshop:
    """Sources that build in a second, a cache, and a pip that only records its calls."""

    def __init__(self, tmp_path, fake_python, reporter, setup, library="mpi_lib_v2.x.so"):
        files = {"setup.py": textwrap.dedent(setup), "horovod/__init__.py": "", "horovod/torch/__init__.py": "marker\n"}
        files[f"horovod/torch/{library}"] = "library"
        archive = tmp_path / "horovod-9.9.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for name, text in files.items():
                info = tarfile.TarInfo(f"horovod-9.9/{name}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
        self.source = sdist.Sdist("horovod", "9.9", hashlib.sha256(archive.read_bytes()).hexdigest())
        self.cache = caches.Cache(tmp_path / "cache")
        self.cache.sdists.mkdir(parents=True)
        archive.rename(self.cache.sdists / archive.name)
        self.changes = (Patch("horovod/torch/__init__.py", "marker", "patched = True", "why"),)
        self.wanted = recipe.recipe(self.source, (TORCH,), Options(), {}, self.changes)
        self.pip = pip.Pip(self.cache.log("pip"), str(fake_python.path))
        self.reporter = reporter

    def obtain(self, **options):
        return install.obtain_wheel(
            self.source,
            self.wanted,
            (TORCH,),
            install.Workshop(Options(**options), self.cache, os.environ, self.pip, self.reporter),
            self.changes,
        )


@pytest.mark.slow
def test_a_build_ends_in_a_patched_wheel_with_its_record_and_the_next_one_takes_it(tmp_path, fake_python, reporter):
    import zipfile

    workshop = Workshop(tmp_path, fake_python, reporter, GOOD_SETUP)
    wheel = workshop.obtain()
    with zipfile.ZipFile(wheel) as archive:
        assert json.loads(archive.read(recipe.RECORD))["frameworks"] == {"torch": "2.13.0+cpu"}
        assert archive.read("horovod/torch/__init__.py") == b"patched = True\n"
        listed = archive.read("horovod-9.9.dist-info/RECORD").decode()
        assert recipe.RECORD in listed  # so that uninstalling removes it
    assert install.requirements(wheel) == ["cloudpickle"]
    assert next(percent for percent in reporter.percents if percent is not None) == 0
    assert "compiling gloo/algorithm.cc for 0 min 00 s" in reporter.notes
    calls = list(fake_python.calls)
    assert len(calls) == 1  # the build tools
    assert "cmake" in calls[0]
    assert workshop.obtain() == wheel
    assert fake_python.calls == calls
    modified = wheel.stat().st_mtime_ns
    assert workshop.obtain(rebuild=True) == wheel
    assert wheel.stat().st_mtime_ns > modified
    assert list((workshop.cache.root / "build").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "library", "says"),
    [
        ("print('a.cc:1: error: no'); raise SystemExit(3)", "mpi_lib_v2.x.so", r"exit status 3.:\na\.cc:1: error: no"),
        (GOOD_SETUP, "other.so", "without a usable wheel"),
        (GOOD_SETUP.replace('version="9.9"', "version=nonsense"), "mpi_lib_v2.x.so", "nonsense"),
    ],
)
def test_a_broken_build_names_its_log_and_installs_and_keeps_nothing(
    tmp_path, fake_python, reporter, setup, library, says
):
    workshop = Workshop(tmp_path, fake_python, reporter, setup, library)
    with pytest.raises(InstallError, match=says) as caught:
        workshop.obtain()
    log = caught.value.log
    assert log is not None
    assert log.read_text() != ""
    assert str(log) in str(caught.value)
    assert workshop.cache.find(workshop.wanted) is None
    assert list((workshop.cache.root / "build").iterdir()) == []
    assert not any("--force-reinstall" in call for call in fake_python.calls)


def test_build_tools_that_cannot_be_fetched(tmp_path, fake_python, reporter):
    workshop = Workshop(tmp_path, fake_python, reporter, GOOD_SETUP)
    fake_python.write(status=1, says="ERROR: no route to host")
    with pytest.raises(InstallError, match="ERROR: no route to host"):
        workshop.obtain()


@pytest.mark.slow
def test_requirements_come_before_the_wheel(tmp_path, fake_python, reporter):
    workshop = Workshop(tmp_path, fake_python, reporter, GOOD_SETUP)
    wheel = workshop.obtain()
    install.install_wheel(wheel, workshop.pip, reporter)
    needed, last = fake_python.calls[-2:]
    assert needed.endswith("install --quiet cloudpickle")
    assert last.endswith(f"--no-deps --force-reinstall {wheel}")
    fake_python.write(status=1, says="ERROR: full")
    with pytest.raises(InstallError, match="ERROR: full"):
        install.install_wheel(wheel, workshop.pip, reporter)
    assert not fake_python.calls[-1].endswith(".whl")


# Running commands


def test_an_interrupted_command_leaves_no_process_behind(tmp_path):
    class Impatient(Recorder):
        def detail(self, line):
            self.said.append(line)
            raise KeyboardInterrupt

    reporter = Impatient()
    with pytest.raises(KeyboardInterrupt):
        process.run(["sh", "-c", "sleep 60 & echo $!; wait"], tmp_path / "log", reporter, what="sleeping")
    child = int(reporter.said[0])
    deadline = time.monotonic() + 5
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(child)


def _alive(number):
    try:
        state = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return state.rsplit(")", 1)[1].split()[0] != "Z"
