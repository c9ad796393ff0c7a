"""Fixtures of the installer's tests."""

import stat

import pytest

from support.installation import Recorder


@pytest.fixture
def reporter():
    return Recorder()


@pytest.fixture
def fake_python(tmp_path):
    """Return a stub of pip's interpreter that records its arguments, prints `says` and exits with `status`."""

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
