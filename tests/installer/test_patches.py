"""Patches of Horovod's sources."""

from dataclasses import replace

import pytest

from hvd_slowmo.installer import patches
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.patches import Patch


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
