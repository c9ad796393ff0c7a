"""The recipe of a wheel, and the cache of wheels."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hvd_slowmo.installer import cache as caches
from hvd_slowmo.installer import recipe, repairs, sdist
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.options import Options
from support.installation import TENSORFLOW, TORCH, Recorder


def test_the_key_changes_with_each_ingredient():
    def key(frameworks=(TORCH,), options=None, env=None, changes=repairs.PATCHES, source=sdist.HOROVOD):
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
        key(changes=repairs.PATCHES[1:]),
        key(source=replace(sdist.HOROVOD, version="0.28.2")),
        key(source=replace(sdist.HOROVOD, sha256="0" * 64)),
        replace(base, python="cpython-399").key,
        replace(base, platform="linux-other").key,
    ]
    assert len(set(different)) == len(different)


def test_a_record_reads_back_and_anything_else_is_none():
    made = recipe.recipe(sdist.HOROVOD, (TORCH, TENSORFLOW), Options(), {"CXX": "g++"})
    assert recipe.read(made.to_json()) == made
    assert made.repairs == ("stall check", "elastic recovery", "signed services", "launcher")
    assert recipe.recipe(sdist.HOROVOD, (TORCH,), Options(), {}, repairs.BUILD).repairs == ()
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


def test_a_wheel_is_taken_only_with_the_hash_that_was_noted(tmp_path):
    wanted = recipe.recipe(sdist.HOROVOD, (TORCH,), Options(), {})
    wheel, other = tmp_path / "horovod-0.28.1-py3-none-any.whl", tmp_path / "other.whl"
    files = {recipe.RECORD: wanted.to_json(), "horovod/torch/mpi_lib_v2.cpython.so": "library"}
    _write_zip(wheel, files)
    _write_zip(other, {**files, "horovod/torch/__init__.py": "run()"})
    cache = caches.Cache(tmp_path / "cache")
    kept = cache.put(wanted, wheel)
    assert caches.is_whole(other, wanted), "its own checksums agree"
    kept.write_bytes(other.read_bytes())
    assert cache.find(wanted) is None
    assert cache.put(wanted, wheel) == cache.find(wanted) == kept
    kept.chmod(0o666)
    assert cache.find(wanted) is None, "another account may have written it"
    kept.chmod(0o600)
    kept.with_name(f"{kept.name}.sha256").unlink()
    assert cache.find(wanted) is None


def test_the_cache_is_private(tmp_path):
    wanted = recipe.recipe(sdist.HOROVOD, (TORCH,), Options(), {})
    (tmp_path / "horovod.whl").write_bytes(b"")
    cache = caches.Cache(tmp_path / "cache")
    cache.make_private()
    kept = cache.put(wanted, tmp_path / "horovod.whl")
    assert cache.root.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in kept.parent.iterdir()} == {0o600}
    cache.root.chmod(0o755)  # of an earlier version: nobody else could write there
    cache.make_private()
    assert cache.root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_cache_to_which_others_may_write_is_refused(tmp_path, mode):
    cache = caches.Cache(tmp_path / "cache")
    cache.make_private()
    cache.root.chmod(mode)
    with pytest.raises(InstallError, match="alone may write") as caught:
        cache.make_private()
    assert f"chmod go-w {cache.root}" in caught.value.fix


def test_a_cache_of_another_account_or_a_link_to_one_is_refused(tmp_path, monkeypatch):
    cache = caches.Cache(tmp_path / "cache")
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.root.symlink_to("elsewhere")
    with pytest.raises(InstallError, match="alone may write"):
        cache.make_private()
    cache.root.unlink()
    cache.make_private()
    monkeypatch.setattr("os.geteuid", lambda: cache.root.stat().st_uid + 1)
    with pytest.raises(InstallError, match=f"Received: owner {cache.root.stat().st_uid}, drwx------"):
        cache.make_private()


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
