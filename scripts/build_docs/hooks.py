# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Makes some pages when mkdocs (mkdocs.yml) builds the documentation: all options, the API of each room, contributing.

The documents can be read in the repository too, so the build turns their links to files outside docs/ into file names.
"""

import ast
import posixpath
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "megatron" / "bridge"

ROOMS = {
    "training": "The run: configuration, loop, save and load, what it says of itself.",
    "planning": "A run planned without running it.",
    "recipes": "Functions that return a ready configuration.",
    "inference": "Batches of prompts, and the parts of scripts that generate text.",
    "models": "Model families, and conversion from and to Hugging Face.",
    "data": "From rows of text to the batches of a step.",
    "peft": "Adapters.",
    "core_repairs": "Repairs of Megatron-Core's optimizers.",
    "offload_engine": "The offloaded step in buckets.",
    "checkpoint": "What a checkpoint is on disk.",
    "utils": "Device, process groups, files, YAML, overrides.",
}
"""Folders of the package and what is in them, in the order of the reference."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from the code, and the one that is outside docs/."""
    sys.path.insert(0, str(Path(__file__).parent))  # mkdocs removes it again once this file is read
    from options import options_page

    pages = {"reference/options.md": options_page(), "reference/api.md": _api_index(), **_api_pages()}
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    pages["contributing.md"] = re.sub(r"\]\(docs/", "](", contributing)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ at the page made of their file, or leave the file's name."""
    here = PurePosixPath(page.file.src_uri).parent

    def inside(match: re.Match) -> str:
        text, target = match.groups()
        path = posixpath.normpath(str(here / target.partition("#")[0]))
        if path == "../CONTRIBUTING.md":
            return f"[{text}]({posixpath.relpath('contributing.md', str(here))})"
        return f"{text} (`{path.removeprefix('../')}`)" if path.startswith("../") else match.group()

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\((?![a-z]+:|#)([^)\s]+)\)", inside, markdown)


def _api_index() -> str:
    rows = [f"| [`megatron.bridge.{room}`](api-{room}.md) | {text} |" for room, text in ROOMS.items()]
    return "\n".join(["# API\n", "What each module says of itself.\n", "| package | |", "|---|---|", *rows, ""])


def _api_pages() -> dict[str, str]:
    """A page for each room: its modules with what they define, in order of their names."""
    pages = {}
    for room, text in ROOMS.items():
        modules = [path for path in sorted((PACKAGE / room).rglob("*.py")) if _defines_something(path)]
        names = [".".join(path.relative_to(PACKAGE.parents[1]).with_suffix("").parts) for path in modules]
        names = [name.removesuffix(".__init__") for name in names]
        sections = (f"## {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n" for name in names)
        pages[f"reference/api-{room}.md"] = "\n".join([f"# megatron.bridge.{room}\n", f"{text}\n", *sections])
    return pages


def _defines_something(path: Path) -> bool:
    """Whether a module defines a public function or class; the others only re-export."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") for node in body)
