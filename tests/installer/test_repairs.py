"""The patches of Horovod's real sources, and the signature that they insert in C++ and in Python."""

import hashlib
import hmac
import os
import py_compile
import shutil
import subprocess
import types

import pytest

from hvd_slowmo.installer import cache, patches, repairs, sdist, signature_source

MAIN = r"""
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <string>
%s
int main(int, char** arguments)
{
    const std::string body{std::istreambuf_iterator<char>(std::cin), {}};
    std::cout << horovod_signature::header(arguments[1], arguments[2], body);
}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    archive = cache.user_cache(os.environ).sdists / sdist.HOROVOD.filename
    if not archive.exists():
        pytest.skip(f"no {archive}: this Horovod came from the cache of wheels")
    return sdist.unpack(sdist.HOROVOD, archive, tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def signer(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("signer")
    (folder / "main.cc").write_text(MAIN % signature_source.CPP)
    subprocess.run([compiler, "-std=c++14", "-Wall", "-Werror", "main.cc", "-o", "signer"], cwd=folder, check=True)

    def sign(key, method, path, body):
        env = {} if key is None else {signature_source.SECRET: key}
        command = [folder / "signer", method, path]
        return subprocess.run(command, input=body, env=env, capture_output=True, check=True).stdout.decode()

    return sign


def expected(key, method, path, body):
    digest = hashlib.sha256(body).hexdigest()
    mac = hmac.new(key.encode(), f"{method}\n{path}\n{digest}".encode(), hashlib.sha256).hexdigest()
    return f"{digest}:{mac}"


@pytest.mark.slow
def test_every_patch_fits_the_sources_once_and_leaves_valid_python(sources):
    patches.apply(sources, repairs.PATCHES)
    for path in {patch.path for patch in repairs.PATCHES if patch.path.endswith(".py")}:
        py_compile.compile(str(sources / path), doraise=True)


@pytest.mark.parametrize("length", [0, 1, 55, 56, 63, 64, 65, 119, 120, 5000])
def test_the_signature_in_cpp_is_hmac_sha256(signer, length):
    body = bytes(number % 256 for number in range(length))
    for key in ("k", "0" * 64, "long " * 30):
        line = f"X-Horovod-Signature: {expected(key, 'PUT', '/global/0', body)}\r\n"
        assert signer(key, "PUT", "/global/0", body) == line


def test_a_process_without_the_secret_sends_no_signature(signer):
    assert signer(None, "GET", "/global/0", b"") == ""
    assert signer("", "GET", "/global/0", b"") == ""


def test_the_signature_in_python_is_the_same_and_holds_for_one_request_only(monkeypatch):
    monkeypatch.setenv(signature_source.SECRET, "secret")
    secret = types.ModuleType("secret")
    secret.__dict__.update(os=os, hashlib=hashlib, hmac=hmac, HOROVOD_SECRET_KEY=signature_source.SECRET)
    secret.compute_digest = lambda key, message: hmac.new(key, message, hashlib.sha256).digest()
    exec(signature_source.PYTHON, secret.__dict__)
    signature = secret.sign("PUT", "/scope/key", b"body")
    assert signature == expected("secret", "PUT", "/scope/key", b"body")
    assert secret.check_signature(signature, "PUT", "/scope/key")
    assert secret.check_body(signature, b"body")
    assert not secret.check_body(signature, b"another")
    other = expected("another secret", "PUT", "/scope/key", b"body")
    for given in (None, "", ":", "é:é", signature[:-1], signature.replace(":", ""), other):
        assert not secret.check_signature(given, "PUT", "/scope/key")
    assert not secret.check_signature(signature, "GET", "/scope/key")
    assert not secret.check_signature(signature, "PUT", "/scope/another")


def test_a_repair_counts_when_all_its_patches_are_in():
    assert repairs.included(repairs.PATCHES) == ("stall check", "elastic recovery", "signed services", "launcher")
    assert repairs.included(repairs.PATCHES[:-1]) == ("stall check", "elastic recovery", "signed services")
    assert repairs.included(repairs.BUILD) == ()
