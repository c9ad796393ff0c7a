"""Download Horovod's sources with pip, verify their pinned hash, and unpack them safely."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.pip import Pip
from hvd_slowmo.installer.reporter import Reporter


@dataclass(frozen=True)
class Sdist:
    """A source distribution.

    Attributes:
        name: name of the distribution.
        version: version of the distribution.
        sha256: SHA-256 hash of the archive in hexadecimal.
    """

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """Return the file name of the archive."""
        return f"{self.name}-{self.version}.tar.gz"


HOROVOD = Sdist("horovod", "0.28.1", "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0")


def fetch(sdist: Sdist, folder: Path, work: Path, tools_env: Mapping[str, str], pip: Pip, reporter: Reporter) -> Path:
    """Return the path of the archive of `sdist` in `folder`, and download it first if it is missing.

    Args:
        sdist: the source distribution.
        folder: directory of the archives.
        work: existing directory for the download.
        tools_env: environment variables with setuptools on `PYTHONPATH`; pip runs the sources' setup.py for metadata.
        pip: pip of the running environment.
        reporter: receives the progress.

    Raises:
        InstallError: pip cannot download the archive, or its checksum is wrong.
    """
    kept = folder / sdist.filename
    if kept.exists():
        verify(sdist, kept)
        return kept
    reporter.say(f"Downloading {sdist.filename}")
    requirement = work / "sdist.txt"
    requirement.write_text(f"{sdist.name}=={sdist.version} --hash=sha256:{sdist.sha256}\n", encoding="utf-8")
    # pip verifies the hash too, before it runs the sources' setup.py for metadata.
    arguments = ["download", "--require-hashes", "--no-deps", "--no-binary", sdist.name, "--no-build-isolation"]
    pip.run(
        [*arguments, "--dest", str(work), "--requirement", str(requirement)],
        reporter,
        what=f"downloading {sdist.filename}",
        fix=f"check the network and pip's settings (`pip config list`); or download {sdist.filename} on another "
        f"machine (the files of {sdist.name} {sdist.version} on PyPI), and put it into {folder}.",
        env=tools_env,
        # Not the current directory: in a checkout of this project, its directories would be importable.
        cwd=work,
    )
    verify(sdist, work / sdist.filename)
    folder.mkdir(parents=True, exist_ok=True)
    incoming = folder / f".{sdist.filename}.{os.getpid()}"
    shutil.copyfile(work / sdist.filename, incoming)
    incoming.replace(kept)
    return kept


def verify(sdist: Sdist, archive: Path) -> None:
    """Compare the SHA-256 hash of `archive` with that of `sdist`.

    Raises:
        InstallError: the archive cannot be read, or its hash differs.
    """
    try:
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
    except OSError as error:
        raise InstallError(
            f"{archive} cannot be read: {error}.", "run the command again; pip should have created the file."
        ) from error
    if found != sdist.sha256:
        raise InstallError(
            f"The checksum of {archive} is wrong: the file is damaged or is not {sdist.name} {sdist.version}. "
            f"Expected: {sdist.sha256}. Received: {found}.",
            f"delete {archive} and run again. If the error recurs, pip's package index does not serve the original.",
        )


def unpack(sdist: Sdist, archive: Path, folder: Path) -> Path:
    """Unpack `archive` into `folder` and return the root of the sources.

    Raises:
        InstallError: an entry lies outside that root, links to outside, or is not a file, directory or symbolic link.
    """
    root = f"{sdist.name}-{sdist.version}"
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        for member in members:
            parts = PurePosixPath(member.name).parts
            if (
                not parts
                or parts[0] != root
                or ".." in parts
                or not (member.isreg() or member.isdir() or _harmless_link(member))
            ):
                raise InstallError(
                    f"{archive} contains an entry that may not be unpacked: {member.name!r}.",
                    f"delete {archive} and run again.",
                )
        if hasattr(tarfile, "data_filter"):  # Python 3.12, and later patch releases of 3.10 and 3.11
            tar.extractall(folder, members=members, filter="data")
        else:
            tar.extractall(folder, members=members)
    return folder / root


def _harmless_link(member: tarfile.TarInfo) -> bool:
    target = PurePosixPath(member.linkname)
    return member.issym() and not target.is_absolute() and ".." not in target.parts
