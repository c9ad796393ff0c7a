"""The documentation is correct: its Python code runs, and the names that it mentions exist.

The ```python blocks of a file run in order and in one namespace, in a separate process per file: one worker without a
launcher, in an empty directory, with warnings as errors. The first line of a block that cannot run is "# Not run: " and
the reason.
"""

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from hvd_slowmo import SlowMoConfig
from hvd_slowmo.cli.main import main
from support import page_code

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
ALONE = ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
PAGES = [README, *(ROOT / name for name in ALONE), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NO_RUN = "# Not run: "
HOROVODS_OWN = ("horovod/", "CMakeLists.txt")  # files in Horovod's sources that a page may name


def blocks(text):
    """Return (info string, number of the first line of code, code) of each fenced block."""
    return [(m[1].strip(), text.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(text)]


def python_blocks(page):
    return [
        (line, code)
        for info, line, code in blocks(page.read_text("utf-8"))
        if info == "python" and not code.startswith(NO_RUN)
    ]


def marked(text):
    """Return the lines that SlowMo adds to a script."""
    return [line.strip() for line in text.splitlines() if line.endswith("# SlowMo")]


def prose(page):
    """Return the page without its fenced blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def rows(text):
    """Return the cells of each table row whose first cell is code."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def slugs(text):
    """Return the anchors of the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_python_code_runs(page, tmp_path):
    status, said = page_code.run(page, python_blocks(page), tmp_path)
    assert status == 0, said


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_block_that_does_not_run_says_why(page):
    for info, line, code in blocks(page.read_text("utf-8")):
        assert info == "python" or not info.startswith("python"), f"line {line}: {info}"  # the site takes one word
        if code.startswith(NO_RUN):
            assert re.match(r"# Not run: \w.{9,}\.$", code, re.MULTILINE), f"line {line}: the reason is missing"


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_the_readme_adds_the_same_lines_as_the_example(framework):
    import_line = {"torch": "import torch\n", "keras": "import keras\n"}[framework]
    code = next(code for _, code in python_blocks(README) if marked(code) and import_line in code)
    example = (ROOT / "examples" / f"minimal_{framework}.py").read_text("utf-8")
    assert marked(code) == marked(example)


def test_the_page_of_loops_has_the_code_of_the_examples():
    examples = "".join(
        (ROOT / "examples" / f"{name}_torch.py").read_text("utf-8") for name in ("lightning", "fabric", "accelerate")
    )
    examples = re.sub(r'    """A classifier of points\."""\n\n', "", examples)
    code = [code for _, _, code in blocks((ROOT / "docs" / "loops.md").read_text("utf-8"))]
    assert len(code) == 4
    for each in code:
        lines = each.partition("\n")[2]
        assert lines in examples or textwrap.indent(lines, "    ") in examples


TORCH_ALONE = {
    "Frozen parameters",
    "BatchNorm and other buffers",
    "On torch.distributed",
}


def test_the_pages_of_the_adapters_have_the_same_order_of_topics():
    pages = [(ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("pytorch", "keras")]
    torch, keras = ([line[3:] for line in page.splitlines() if line.startswith("## ")] for page in pages)
    common = [topic for topic in torch if topic in keras]
    assert set(torch) - set(keras) == TORCH_ALONE
    assert [topic for topic in keras if topic in torch] == common


def test_the_table_of_both_adapters_has_every_method():
    from hvd_slowmo.torch import SlowMo

    text = (ROOT / "docs" / "keras.md").read_text("utf-8")
    table = text[text.index("## Both adapters") :]
    for name in vars(SlowMo):
        own = not name.startswith("_") and not hasattr(SlowMo.__mro__[1], name)
        if own and name not in ("param_groups", "state", "defaults"):
            assert re.search(rf"`{name}\b", table), name


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(((?:[^()\s]|\([^()\s]*\))+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if fragment:
            assert fragment in slugs(file.read_text("utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_files_exist(page):
    text = re.sub(r"\]\([^)]*\)|https?://\S+", "", page.read_text("utf-8"))  # another test covers links
    paths = re.findall(r"(?<![\w/.~$<>-])((?:[\w.-]+/)+[\w.-]+\.(?:py|md|toml|txt|cc))\b", text)
    spans = re.findall(r"`([\w./-]+)`", prose(page))
    paths += [span for span in spans if re.search(r"\.(py|md|toml|txt)$", span) or span.endswith("/")]
    for path in paths:
        if not path.startswith(HOROVODS_OWN) and path != "__init__.py":
            assert (ROOT / path).exists() or (page.parent / path).exists(), path


def test_every_setting_is_in_the_readme_with_its_default():
    table = {row[0].strip("`"): row for row in rows(README.read_text("utf-8"))}
    for field in dataclasses.fields(SlowMoConfig):
        default = repr(field.default).replace("'", '"')
        assert field.name in table, f"no row for {field.name}"
        assert table[field.name][1] == f"`{default}`", field.name
        assert len(table[field.name]) == 4


def test_every_preset_is_in_the_readme_as_it_is_called():
    table = [row[0] for row in rows(README.read_text("utf-8"))]
    for name, preset in inspect.getmembers(SlowMoConfig, inspect.ismethod):
        if name.startswith("_") or name == "from_facts":  # the inverse of facts(), not a preset
            continue
        own = [p for p in inspect.signature(preset).parameters.values() if p.kind is not p.VAR_KEYWORD]
        call = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in own)
        assert f"`SlowMoConfig.{name}({call})`" in table


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page, capsys):
    text = page.read_text("utf-8")
    commands = help_of(capsys)
    for command, rest in re.findall(r"hvd-slowmo ([a-z][a-z-]*)((?: --[a-z-]+)*)(?=[`\s])", code_of(text)):
        assert re.search(rf"^\s+{command}\s", commands, re.MULTILINE), command
        options = help_of(capsys, command)
        for option in rest.split():
            assert re.search(rf"{option}\b", options), f"{command} {option}"
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", code_of(text), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_option_of_install_horovod_is_described(capsys):
    table = [row[0] for row in rows((ROOT / "docs" / "running.md").read_text("utf-8"))]
    for option in set(re.findall(r"--[a-z-]+", help_of(capsys, "install-horovod"))) - {"--help"}:
        assert any(re.match(rf"`{option}\b", cell) for cell in table), option


def code_of(text):
    """Return the fenced blocks and code spans of a page, one per line."""
    spans = [f"`{span}`" for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]
    return "\n".join([*(code for _, _, code in blocks(text)), *spans])
