"""Requirements of a build."""

import os
import sys
import sysconfig

import pytest

from hvd_slowmo.installer import pip, preflight
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.frameworks import Framework, package_folder, supported
from hvd_slowmo.installer.options import Options
from support.installation import ROOT, TENSORFLOW, TORCH, run_code


def test_without_a_compiler(tmp_path):
    with pytest.raises(InstallError, match=r"No C\+\+ compiler was found \(tried c\+\+, g\+\+, clang\+\+\)") as caught:
        preflight.require_compiler({"PATH": str(tmp_path)})
    assert "apt install g++" in caught.value.fix
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
    assert "XDG_CACHE_HOME" in caught.value.fix


def test_without_headers(tmp_path):
    with pytest.raises(InstallError, match=r"headers are missing .*Python\.h"):
        preflight.require_headers((TORCH,), tmp_path)
    preflight.require_headers((TENSORFLOW,), tmp_path)


def test_without_a_usable_framework():
    with pytest.raises(InstallError, match="has neither") as caught:
        supported(())
    assert "pip install torch" in caught.value.fix
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
    assert "venv" in caught.value.fix


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
    found = run_code(code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert found.stdout.strip() == "[('torch', '2.9.1+cu130', True, 20), ('tensorflow', '2.20.0', True, 17)]", (
        found.stderr
    )
    assert package_folder("hvd_slowmo") == ROOT / "hvd_slowmo"
