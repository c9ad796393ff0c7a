"""The installer without a build: each step alone, and the whole on sources that take a second to build."""

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hvd_slowmo.cli import main
from hvd_slowmo.installer import cache as caches
from hvd_slowmo.installer import install, patches, pip, preflight, process, recipe, sdist
from hvd_slowmo.installer.build import build_environment
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.frameworks import Framework, package_folder, supported
from hvd_slowmo.installer.options import Options, passed_on
from hvd_slowmo.installer.patches import Patch

ROOT = Path(__file__).resolve().parents[2]
TORCH = Framework("torch", "2.13.0+cpu", cuda=False)
TENSORFLOW = Framework("tensorflow", "2.21.0", cuda=False)


class Recorder:
    """A Reporter that keeps what it is told."""

    def __init__(self):
        self.said = []
        self.percents = []

    def say(self, text):
        self.said.append(text)

    def detail(self, line):
        pass

    def progress(self, what, percent, seconds):
        self.percents.append(percent)

    def finish_progress(self):
        pass


@pytest.fixture
def reporter():
    return Recorder()


@pytest.fixture
def fake_python(tmp_path):
    """Stands in for the interpreter that runs pip: notes its arguments, prints `says`, exits with `status`."""

    class Fake:
        path = tmp_path / "fake-python"
        notes = tmp_path / "fake-python.notes"

        def write(self, status=0, says=""):
            self.path.write_text(f"#!/bin/sh\necho \"$*\" >> '{self.notes}'\necho '{says}'\nexit {status}\n")
            self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)

        @property
        def calls(self):
            return self.notes.read_text().splitlines() if self.notes.exists() else []

    fake = Fake()
    fake.write()
    return fake


# Patches


def test_a_patch_replaces_its_text(tmp_path):
    (tmp_path / "a.txt").write_text("set(STANDARD 14)\nrest\n")
    patches.apply(
        tmp_path, (Patch("a.txt", "STANDARD 14", "STANDARD 17", "why"), Patch("a.txt", "rest", "more", "why"))
    )
    assert (tmp_path / "a.txt").read_text() == "set(STANDARD 17)\nmore\n"


@pytest.mark.parametrize("text", ["nothing of it", "twice twice"])
def test_a_patch_whose_text_is_not_there_once_is_refused_and_nothing_is_written(tmp_path, text):
    (tmp_path / "a.txt").write_text("good\n")
    (tmp_path / "b.txt").write_text(text)
    both = (Patch("a.txt", "good", "better", "why"), Patch("b.txt", "twice", "thrice", "why"))
    with pytest.raises(InstallError, match=r"b\.txt holds 'twice', .* [02] times"):
        patches.apply(tmp_path, both)
    assert (tmp_path / "a.txt").read_text() == "good\n"


def test_a_patch_of_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InstallError, match=r"no readable b\.txt"):
        patches.apply(tmp_path, (Patch("b.txt", "x", "y", "why"),))


def test_the_digest_follows_what_patches_do_and_not_why():
    one = Patch("a", "b", "c", "why")
    assert patches.digest((one,)) == patches.digest((replace(one, reason="another"),))
    changed = [replace(one, path="x"), replace(one, before="x"), replace(one, after="x")]
    assert len({patches.digest((each,)) for each in [one, *changed]}) == 4


# The recipe and the cache


def test_the_key_changes_with_each_ingredient():
    def key(frameworks=(TORCH,), options=None, env=None, changes=patches.PATCHES, source=sdist.HOROVOD):
        return recipe.recipe(source, frameworks, options or Options(), env or {}, changes).key

    same = [key(), key(options=Options(rebuild=True, jobs=3)), key(env={"HOME": "/elsewhere"})]
    assert len(set(same)) == 1
    base = recipe.recipe(sdist.HOROVOD, (TORCH,), Options(), {})
    different = [
        key(),
        key(frameworks=(replace(TORCH, version="2.13.0+cu130"),)),
        key(frameworks=(TENSORFLOW,)),
        key(frameworks=(TORCH, TENSORFLOW)),
        key(options=Options(mpi=True)),
        key(options=Options(nccl=True)),
        key(env={"HOROVOD_BUILD_CUDA_CC_LIST": "90"}),
        key(env={"CXX": "clang++"}),
        key(changes=patches.PATCHES[1:]),
        key(source=replace(sdist.HOROVOD, version="0.28.2")),
        key(source=replace(sdist.HOROVOD, sha256="0" * 64)),
        replace(base, python="cpython-399").key,
        replace(base, platform="linux-other").key,
    ]
    assert len(set(different)) == len(different)


def test_a_record_reads_back_and_anything_else_is_none():
    made = recipe.recipe(sdist.HOROVOD, (TORCH, TENSORFLOW), Options(), {"CXX": "g++"})
    assert recipe.read(made.to_json()) == made
    assert made.stall_check_mended
    assert recipe.read("{}") is None
    assert recipe.read("no json") is None


def test_the_cache_gives_back_whole_wheels_only(tmp_path):
    wanted = recipe.recipe(sdist.HOROVOD, (TORCH,), Options(), {})
    other = recipe.recipe(sdist.HOROVOD, (TENSORFLOW,), Options(), {})
    wheel = tmp_path / "horovod-0.28.1-py3-none-any.whl"
    files = {recipe.RECORD: wanted.to_json(), "horovod/torch/mpi_lib_v2.cpython.so": "x" * 10000}
    _write_zip(wheel, files)
    cache = caches.Cache(tmp_path / "cache")
    assert cache.find(wanted) is None
    kept = cache.put(wanted, wheel)
    assert cache.find(wanted) == kept
    assert cache.find(other) is None
    assert not caches.is_whole(kept, other)
    data = kept.read_bytes()
    kept.write_bytes(data[: len(data) // 2])
    assert cache.find(wanted) is None
    kept.write_bytes(data.replace(b"xxxx", b"xyxx", 1))
    assert cache.find(wanted) is None
    _write_zip(kept, {recipe.RECORD: wanted.to_json()})
    assert cache.find(wanted) is None


def test_two_builders_of_one_wheel_take_turns(tmp_path, reporter):
    wanted = recipe.recipe(sdist.HOROVOD, (TORCH,), Options(), {})
    cache = caches.Cache(tmp_path)
    second = Recorder()
    order = []

    def build():
        with cache.building(wanted, second) as folder:
            order.append(("second", sorted(path.name for path in folder.iterdir())))

    with cache.building(wanted, reporter) as folder:
        (folder / "left.txt").write_text("")
        thread = threading.Thread(target=build)
        thread.start()
        deadline = time.monotonic() + 10
        while not second.said and time.monotonic() < deadline:
            time.sleep(0.01)
        order.append(("first", []))
    thread.join(10)
    assert order == [("first", []), ("second", [])]
    assert "waiting" in second.said[0]
    assert not folder.exists()


def test_the_cache_lies_where_the_environment_says(tmp_path):
    assert caches.user_cache({"XDG_CACHE_HOME": str(tmp_path)}).root == tmp_path / "hvd-slowmo"
    assert caches.user_cache({}).root == Path.home() / ".cache" / "hvd-slowmo"
    assert caches.user_cache({"XDG_CACHE_HOME": "relative"}).root == Path.home() / ".cache" / "hvd-slowmo"


def _write_zip(path, files):
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


# What must be there


def test_without_a_compiler(tmp_path):
    with pytest.raises(InstallError, match=r"No C\+\+ compiler was found \(tried c\+\+, g\+\+, clang\+\+\)") as caught:
        preflight.require_compiler({"PATH": str(tmp_path)})
    assert "apt install g++" in caught.value.cure
    with pytest.raises(InstallError, match=r"tried missing-g\+\+"):
        preflight.require_compiler({"PATH": str(tmp_path), "CXX": "missing-g++ -O2"})
    with pytest.raises(InstallError, match="make was not found"):
        preflight.require_make({"PATH": str(tmp_path)})


def test_with_a_compiler_that_does_not_work(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'cannot find cc1plus' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(InstallError, match=r"cannot compile a C\+\+17 program:\ncannot find cc1plus"):
        preflight.require_compiler({"PATH": f"{tmp_path}:/bin:/usr/bin"})


def test_without_space(tmp_path):
    with pytest.raises(InstallError, match=r"The build needs 1000000000\.0 GB") as caught:
        preflight.require_space(tmp_path / "not" / "there", needed=10**18)
    assert "XDG_CACHE_HOME" in caught.value.cure


def test_without_headers(tmp_path):
    with pytest.raises(InstallError, match=r"headers are missing .*Python\.h"):
        preflight.require_headers((TORCH,), tmp_path)
    preflight.require_headers((TENSORFLOW,), tmp_path)


def test_without_a_usable_framework():
    with pytest.raises(InstallError, match="has neither") as caught:
        supported(())
    assert "pip install torch" in caught.value.cure
    with pytest.raises(InstallError, match=r"has only PyTorch 2\.0\.1, TensorFlow 2\.15\.0"):
        supported((Framework("torch", "2.0.1", cuda=False), Framework("tensorflow", "2.15.0", cuda=False)))
    assert supported((TORCH, Framework("tensorflow", "2.9.0", cuda=False))) == (TORCH,)


def test_mpi_and_cuda_where_asked_for(tmp_path):
    empty = {"PATH": str(tmp_path)}
    preflight.require_mpi(Options(), empty)
    preflight.require_cuda(Options(), (TORCH,), empty)
    with pytest.raises(InstallError, match="mpicxx"):
        preflight.require_mpi(Options(mpi=True), empty)
    with pytest.raises(InstallError, match=r"PyTorch 2\.13\.0\+cpu is not"):
        preflight.require_cuda(Options(nccl=True), (TORCH,), empty)


def test_an_environment_that_pip_may_not_change(tmp_path, monkeypatch):
    pip.require_usable_environment()
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "EXTERNALLY-MANAGED").write_text("")
    with pytest.raises(InstallError, match="managed by the system") as caught:
        pip.require_usable_environment()
    assert "venv" in caught.value.cure


def test_frameworks_are_found_without_importing_them(tmp_path):
    packages = tmp_path / "torch", tmp_path / "tensorflow" / "python" / "platform", tmp_path / "namespace"
    for folder in packages:
        folder.mkdir(parents=True)
    for init in (tmp_path / "torch", tmp_path / "tensorflow"):
        (init / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch" / "version.py").write_text(
        "__version__ = '2.9.1+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n"
    )
    headers = tmp_path / "torch" / "include" / "ATen"
    headers.mkdir(parents=True)
    (headers / "ATen.h").write_text("#error C++20 or later compatible compiler is required to use ATen.\n")
    info = "build_info = collections.OrderedDict([('is_cuda_build', True), ('cuda_version', '12.5')])\n"
    (tmp_path / "tensorflow" / "python" / "platform" / "build_info.py").write_text(info)
    metadata = tmp_path / "tensorflow_cpu-2.20.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorflow-cpu\nVersion: 2.20.0\n")
    code = """
        from hvd_slowmo.installer.frameworks import detect, package_folder
        assert package_folder("namespace") is None and package_folder("absent") is None
        print([(f.name, f.version, f.cuda, f.cxx) for f in detect()])
    """
    found = _python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert found.stdout.strip() == "[('torch', '2.9.1+cu130', True, 20), ('tensorflow', '2.20.0', True, 17)]", (
        found.stderr
    )
    assert package_folder("hvd_slowmo") == ROOT / "hvd_slowmo"


# The sources


def test_an_archive_with_another_checksum_is_refused(tmp_path, reporter, fake_python):
    kept = tmp_path / "horovod-0.28.1.tar.gz"
    kept.write_bytes(b"something else")
    with pytest.raises(InstallError, match="checksum") as caught:
        sdist.fetch(sdist.HOROVOD, tmp_path, tmp_path, {}, pip.Pip(tmp_path / "log", str(fake_python.path)), reporter)
    assert str(kept) in caught.value.cure
    assert fake_python.calls == []


def test_a_download_that_fails_names_cause_cure_and_log(tmp_path, reporter, fake_python):
    fake_python.write(status=1, says="ERROR: Could not find a version that satisfies the requirement horovod")
    log = tmp_path / "logs" / "pip.log"
    with pytest.raises(InstallError, match="ERROR: Could not find a version") as caught:
        sdist.fetch(sdist.HOROVOD, tmp_path / "sdist", tmp_path, {}, pip.Pip(log, str(fake_python.path)), reporter)
    assert f"put it into {tmp_path / 'sdist'}" in caught.value.cure
    assert f"Full log: {log}" in str(caught.value)
    assert not (tmp_path / "sdist").exists()


def test_a_download_of_something_else_is_not_kept(tmp_path, reporter, fake_python):
    (tmp_path / sdist.HOROVOD.filename).write_bytes(b"not Horovod")  # as if pip had put it there
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
    assert got[patches.CXX_STANDARD] == "17"
    newer = (replace(TORCH, cxx=20), TENSORFLOW)
    assert build_environment(tmp_path, env, newer, Options())[patches.CXX_STANDARD] == "20"
    assert passed_on(env) == {"CXX": "g++", "HOROVOD_BUILD_CUDA_CC_LIST": "90"}


GOOD_SETUP = """
    import os, setuptools
    assert os.environ["HOROVOD_WITH_PYTORCH"] == "1"
    print("[ 50%] Building")
    setuptools.setup(name="horovod", version="9.9", packages=["horovod", "horovod.torch"],
                     package_data={"horovod.torch": ["*.so"]}, install_requires=["cloudpickle"],
                     extras_require={"dev": ["mock"]})
"""


class Workshop:
    """Sources that build in a second, a cache, and a pip that only takes notes."""

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
            Options(**options),
            self.cache,
            os.environ,
            self.pip,
            self.reporter,
            self.changes,
        )


def test_a_build_ends_in_a_patched_wheel_with_its_record_and_the_next_one_takes_it(tmp_path, fake_python, reporter):
    import zipfile

    workshop = Workshop(tmp_path, fake_python, reporter, GOOD_SETUP)
    wheel = workshop.obtain()
    with zipfile.ZipFile(wheel) as archive:
        assert json.loads(archive.read(recipe.RECORD))["frameworks"] == {"torch": "2.13.0+cpu"}
        assert archive.read("horovod/torch/__init__.py") == b"patched = True\n"
        listed = archive.read("horovod-9.9.dist-info/RECORD").decode()
        assert recipe.RECORD in listed  # so that uninstalling takes it away
    assert install.requirements(wheel) == ["cloudpickle"]
    assert 50 in reporter.percents
    calls = list(fake_python.calls)
    assert len(calls) == 1  # the build tools
    assert "cmake" in calls[0]
    assert workshop.obtain() == wheel
    assert fake_python.calls == calls
    modified = wheel.stat().st_mtime_ns
    assert workshop.obtain(rebuild=True) == wheel
    assert wheel.stat().st_mtime_ns > modified
    assert list((workshop.cache.root / "build").iterdir()) == []


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


# The command line


def _python(code, **env):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def _without_frameworks(*arguments, cache):
    code = f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "tensorflow", "keras"):
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent())
        from hvd_slowmo.cli import main
        sys.exit(main({list(arguments)!r}))
    """
    return _python(code, PYTHONPATH=str(ROOT), XDG_CACHE_HOME=str(cache))


def test_install_horovod_without_a_framework_says_so_and_fails(tmp_path):
    result = _without_frameworks("install-horovod", cache=tmp_path)
    assert result.returncode == 1
    assert "has neither" in result.stderr
    assert "Cure: install the framework first" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


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
