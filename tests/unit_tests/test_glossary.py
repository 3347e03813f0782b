# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""One word for one thing: the documents and the source avoid the synonyms of the glossary in docs/architecture.md."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit_tests.test_documentation import DOCUMENTS, ROOT, without_fences

pytestmark = pytest.mark.any_core

FOLDERS = ("src", "scripts", "benchmarks", "tests")

INSTEAD_OF = {
    r"main[ -]params?|master[ -](weights?|cop(y|ies)|params?|parameters?)": "master",
    r"CPU clones?": "CPU copy",
    r"inner optimizers?": "sub-optimizer",
    r"parallel layouts?": "layout",
    r"RNG[ -]states?(?! (is wrong size|changed))": "random state",  # but for torch's and Core's own messages
    r"mend(s|ed|ing)?": "repair, for a defect of Core's; else fix",
    r"(data|DP)[ -]ranks?": "data-parallel rank",
    r"micro ?batch(es)?|mini-?batch(es)?": "micro-batch",
    r"go(es)? on|going on|went on|picks? up where": "resume, or continue",
    r"re-shard(s|ed|ing)?": "reshard",
    r"to the bit|bit (by|for) bit|bitwise|bit[- ]identical|bit[- ]equal|bit exact": "bit-exact",
    r"offload(ed)? (ratio|share)s?": "offload fraction",
    r"precision aware|non-precision-aware": "precision-aware",
    r"held out (loss|samples?|answers?)|hold-?out": "held-out",
    r"anew": "again",
    r"as it stands|which is why|(what|that) (came|comes) of it": "a plainer sentence",
}
"""Patterns of what not to write, whatever the case of its letters, and what to write."""

FORBIDDEN = {re.compile(rf"\b({pattern})\b", re.IGNORECASE): word for pattern, word in INSTEAD_OF.items()}
ANY_OF_THEM = re.compile(rf"\b({'|'.join(INSTEAD_OF)})\b", re.IGNORECASE)


def prose_of_markdown(text: str) -> str:
    """Without code and the targets of links."""
    return re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "` `", without_fences(text), flags=re.DOTALL)


def prose_of_python(source: str) -> str:
    """Comments and texts, docstrings and messages among them; names between backticks are code.

    Empty where nothing in the file, code included, looks like a forbidden word: that is quick to see.
    """
    if not ANY_OF_THEM.search(re.sub(r"[\s#]+", " ", re.sub(r'"\s*\n\s*f?"', "", source))):
        return ""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = " ".join(token.string.removeprefix("#") for token in tokens if token.type == tokenize.COMMENT)
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return re.sub(r"`[^`\n]*`", "` `", "\n".join([comments, *(text for text in texts if isinstance(text, str))]))


def other_words(prose: str) -> Iterator[str]:
    """What the prose says in another word than the glossary's, a line each."""
    prose = " ".join(prose.split())
    for pattern, word in FORBIDDEN.items():
        for found in pattern.finditer(prose):
            context = prose[max(found.start() - 30, 0) : found.end() + 30]
            yield f"{found.group()!r} in '...{context}...': write {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_document_keeps_the_glossary(document):
    assert list(other_words(prose_of_markdown(document.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_sources_keep_the_glossary(folder):
    sources = sorted(set((ROOT / folder).rglob("*.py")) - {Path(__file__)})
    found = {path: list(other_words(prose_of_python(path.read_text(encoding="utf-8")))) for path in sources}
    assert [f"{path.relative_to(ROOT)}: {line}" for path, lines in found.items() for line in lines] == []


def test_the_words_to_write_are_in_the_glossary():
    glossary = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Glossary")[2]
    for word in ("master", "layout", "repair", "resume", "reshard", "bit-exact", "held-out", "bucket", "load plan"):
        assert re.search(rf"^\|[^|]*\b{word}\b[^|]*\|", glossary, re.MULTILINE), word


def test_the_checker_reads_prose_and_leaves_code_alone():
    bad = "A resume goes\non, equal `goes on` to\nthe bit.\n```\ndata rank\n```\n[x](going on.md)"
    assert [line.split("'")[1] for line in other_words(prose_of_markdown(bad))] == ["goes on", "to the bit"]
    code = 'x = f"{data_ranks} data ranks"  # main params\ndef mend():\n    """Mends `anew`."""\n'
    found = [line.split("'")[1] for line in other_words(prose_of_python(code))]
    assert sorted(found) == ["Mends", "data ranks", "main params"]
