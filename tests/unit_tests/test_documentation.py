# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What the documentation points at exists: links, headings, make targets, modules, files."""

import importlib.util
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron.bridge import __version__

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "megatron" / "bridge"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), *(ROOT / "docs").rglob("*.md")])


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def code_in(text: str) -> Iterator[str]:
    """Fenced blocks, and code between backticks."""
    yield from re.findall(r"^```.*?^```", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", without_fences(text))


def anchors_of(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_fences(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links whose file, or heading in it, is not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = folder / path
        if path and not file.exists():
            broken.append(target)
        elif anchor and anchor not in anchors_of(file.read_text(encoding="utf-8") if path else text):
            broken.append(target)
    return broken


def unknown_targets(text: str, makefile: str) -> list[str]:
    """`make X` in code, where the Makefile has no X."""
    known = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    commands = [
        command for code in code_in(text) for command in re.findall(r"^(?:.*[`;&] *)?make .*", code, re.MULTILINE)
    ]
    words = [word for command in commands for word in re.sub(r'"[^"]*"', "", command).split("#")[0].split()]
    return [word for word in words if re.fullmatch(r"[a-z-]+", word) and word != "make" and word not in known]


def missing_modules(text: str) -> list[str]:
    """Modules of ours that are run or imported in code and don't exist."""
    named = set()
    for code in code_in(text):
        named |= set(re.findall(r"(?:from|-m) (megatron\.bridge[\w.]*)", code))
    return sorted(name for name in named if importlib.util.find_spec(name) is None)


def missing_files(text: str) -> list[str]:
    """Python files and folders of ours that code names and that are nowhere in the repository."""
    everything = [
        path.relative_to(ROOT).as_posix()
        for place in ("src", "tests", "scripts", "benchmarks")
        for path in (ROOT / place).rglob("*.py")
    ]
    missing = []
    for code in code_in(text):
        for name in re.findall(r"(?<![\w/<>.-])[\w./*-]+\.py\b", code):
            pattern = re.compile(rf"(.*/)?{re.escape(name.removeprefix('./')).replace(re.escape('*'), '[^/]*')}")
            if name not in ("my_script.py", "my_recipes.py") and not any(
                pattern.fullmatch(path) for path in everything
            ):
                missing.append(name)
    return missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
class TestEachDocument:
    def test_links_lead_somewhere(self, document):
        assert broken_links(document.read_text(encoding="utf-8"), document.parent) == []

    def test_make_targets_exist(self, document):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert unknown_targets(document.read_text(encoding="utf-8"), makefile) == []

    def test_modules_exist(self, document):
        assert missing_modules(document.read_text(encoding="utf-8")) == []

    def test_files_exist(self, document):
        assert missing_files(document.read_text(encoding="utf-8")) == []

    def test_it_is_in_the_index(self, document):
        index = ROOT / "docs" / "README.md"
        if document.is_relative_to(ROOT / "docs") and document != index:
            assert f"({document.relative_to(ROOT / 'docs').as_posix()})" in index.read_text(encoding="utf-8")


def test_the_picture_is_small():
    assert 1_000 < (ROOT / "docs" / "images" / "loss.png").stat().st_size < 200_000


def test_each_room_and_document_is_in_the_site():
    hooks = (ROOT / "scripts" / "build_docs" / "hooks.py").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r'^    "(\w+)": "', hooks, re.MULTILINE)) == rooms
    assert rooms <= set(re.findall(r"reference/api-(\w+)\.md", navigation))
    for document in (ROOT / "docs").rglob("*.md"):
        assert f": {document.relative_to(ROOT / 'docs').as_posix()}\n" in navigation


def test_python_in_the_readme_compiles_and_names_what_is_there():
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert blocks
    for block in blocks:
        compile(textwrap.dedent(block), "README.md", "exec")


def test_the_changelog_and_the_citation_are_of_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert all(released), headings
    dates = [release[2] for release in released]
    assert dates == sorted(dates, reverse=True)
    assert released[0][1] == __version__ if released else f"what {__version__} will hold" in changelog
    kinds = set(re.findall(r"^### (.+)$", changelog, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


BAD = """# A heading

See [here](nowhere.md), [there](#no-such-heading), [this](#a-heading), [that](https://example.org/x).
Run `make nothing` or `make test ARGS="make this"`, and make sure that `models/nothing.py` and `ranks.py` are there.

```
python -m megatron.bridge.nothing
make also-nothing VENV=.venv   # a comment
```
"""


def test_the_checkers_find_what_is_missing(tmp_path):
    assert broken_links(BAD, tmp_path) == ["nowhere.md", "#no-such-heading"]
    assert unknown_targets(BAD, "test: install\n\tpytest\n") == ["also-nothing", "nothing"]
    assert missing_modules(BAD) == ["megatron.bridge.nothing"]
    assert missing_files(BAD) == ["models/nothing.py"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_is_wrapped(document):
    """Tables can't be."""
    lines = without_fences(document.read_text(encoding="utf-8")).splitlines()
    assert [line for line in lines if len(line) > 160 and not line.startswith("|")] == []
