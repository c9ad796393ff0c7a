"""The site of the documentation: its pages, its reference of settings and of the public names, and that it builds."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hvd_slowmo import DPSGD, SGP, SlowMoConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
API = (DOCS / "api.md").read_text("utf-8")


def pages(nav):
    """Return the files of a navigation, sections included."""
    values = [value for entry in nav for value in entry.values()]
    return [page for value in values for page in (pages(value) if isinstance(value, list) else [value])]


def test_every_page_is_in_the_navigation_once_and_exists():
    assert sorted(pages(SITE["nav"])) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_site_asks_no_other_host_for_anything():
    assert SITE["theme"]["font"] is False
    assert not SITE["use_directory_urls"]  # a directory's index is a server's matter
    assert not {"extra_css", "extra_javascript"} & set(SITE)


def test_pages_link_to_pages_and_not_out_of_the_directory():
    for page in DOCS.glob("*.md"):
        assert "](../" not in page.read_text("utf-8"), page.name  # files beside it are not part of the site


@pytest.mark.parametrize("door", ["torch", "tf"])
def test_every_public_name_is_in_the_reference(door):
    listed = set(re.findall(r"^::: [\w.]*?(\w+)$", API, re.MULTILINE))
    for members in re.findall(r"members: \[(.*)\]", API):
        listed |= set(members.split(", "))
    module = ast.parse((ROOT / "hvd_slowmo" / f"{door}.py").read_text("utf-8"))
    names = next(node.value for node in module.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    assert set(ast.literal_eval(names)) <= listed


@pytest.mark.slow  # imports both frameworks
def test_every_entry_of_the_reference_exists():
    for path, members in re.findall(r"^::: ([\w.]+)(?:\n    options:\n      members: \[(.*)\])?", API, re.MULTILINE):
        try:
            item = importlib.import_module(path)
        except ModuleNotFoundError:
            module, _, name = path.rpartition(".")
            item = getattr(importlib.import_module(module), name)
        for member in filter(None, members.split(", ")):
            assert hasattr(item, member), f"{path}.{member}"


def test_every_setting_has_a_row_with_its_default_and_an_example_of_another_value():
    lines = [line for line in (DOCS / "settings.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    table = {
        cells[0].strip("`"): cells for cells in ([c.strip() for c in line.strip("|").split(" | ")] for line in lines)
    }
    for field in dataclasses.fields(SlowMoConfig):
        _, default, rule, example = table[field.name]
        assert default == "`" + repr(field.default).replace("'", '"') + "`", field.name
        assert rule
        config = eval(example.strip("`"), {"SlowMoConfig": SlowMoConfig, "SGP": SGP, "DPSGD": DPSGD})  # our own page
        assert getattr(config, field.name) != field.default, field.name


@pytest.mark.slow
@pytest.mark.thorough
def test_the_site_builds_without_a_warning():
    pytest.importorskip("zensical", reason="`make docs` installs it")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    site = ROOT / SITE["site_dir"]
    assert {page.stem for page in DOCS.glob("*.md")} <= {page.stem for page in site.glob("*.html")}
    for page in site.glob("*.html"):
        assert not re.search(r'<(?:script|img|iframe)[^>]* src="?https?:', page.read_text("utf-8")), page.name
        assert not re.search(r'<link[^>]* rel="?stylesheet"?[^>]* href="?https?:', page.read_text("utf-8")), page.name
