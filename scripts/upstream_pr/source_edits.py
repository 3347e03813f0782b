# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Edits of a Python file by what its syntax tree says, so that none of its text needs to be known."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

LINE_LENGTH = 119


class Misfit(Exception):
    """A place that an edit needs isn't there; the message says which, and what to do by hand."""


@dataclass
class SourceFile:
    """A file's text with the edits that are planned for it; lines are those of the text as it was read."""

    text: str
    edits: list[tuple[int, int, list[str]]] = field(default_factory=list)
    """(first line, line after the last, new lines), counted from 0."""

    def __post_init__(self) -> None:
        self.newline = "\r\n" if 0 < self.text.count("\n") == self.text.count("\r\n") else "\n"
        self.lines = self.text.split(self.newline)
        self.tree = ast.parse(self.text)

    def replace(self, node: ast.stmt, new: str, *, with_comment: bool = False) -> None:
        """Put other lines, or none, in a statement's place; with the comment above it where that is asked for."""
        start = first_line(node)
        comment = " " * node.col_offset + "#"
        while with_comment and start > 0 and self.lines[start - 1].startswith(comment):
            start -= 1
        end = node.end_lineno
        if not new and end < len(self.lines) and not self.lines[start - 1].strip() and not self.lines[end].strip():
            end += 1  # one blank line stays of two
        self.edits.append((start, end, new.splitlines()))

    def insert(self, line: int, new: str) -> None:
        """Put lines before a line."""
        self.edits.append((line, line, new.splitlines()))

    def function(self, name: str) -> ast.FunctionDef:
        """A function of the module.

        Raises:
            Misfit: It has none of that name.
        """
        found = [node for node in self.tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        if len(found) != 1:
            raise Misfit(f"the function {name} is there {len(found)} times")
        return found[0]

    def bound_names(self) -> set[str]:
        """What the module's own level imports or defines."""
        names = set()
        for node in self.tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
        return names

    def import_name(self, module: str, *names: str) -> None:
        """Import what isn't bound yet, in isort's place: in an import from that module, or in one of its own."""
        new = set(names) - self.bound_names()
        imports = [node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        if not new:
            return
        for node in imports:
            if isinstance(node, ast.ImportFrom) and node.module == module and not self._has_comment(node):
                aliases = [f"{alias.name} as {alias.asname}" if alias.asname else alias.name for alias in node.names]
                self.replace(node, import_line(module, [*aliases, *new]))
                return
        alike = [node for node in imports if isinstance(node, ast.ImportFrom) and _group(node.module) == _group(module)]
        after = next((node for node in alike if (node.module or "") > module), None)
        if after is not None:
            self.insert(first_line(after), import_line(module, list(new)))
        elif alike:
            self.insert(alike[-1].end_lineno, import_line(module, list(new)))
        elif imports:
            self.insert(imports[-1].end_lineno, "\n" + import_line(module, list(new)))
        else:
            raise Misfit("no import to put another one beside")

    def edited(self) -> str:
        """The text with all edits."""
        lines = list(self.lines)
        in_order = sorted(range(len(self.edits)), key=lambda at: (*self.edits[at][:2], at))
        for at in reversed(in_order):  # from the end, so that lines before keep their numbers
            start, end, new = self.edits[at]
            lines[start:end] = new
        return self.newline.join(lines)

    def _has_comment(self, node: ast.stmt) -> bool:
        return any("#" in line for line in self.lines[node.lineno - 1 : node.end_lineno])


def first_line(node: ast.stmt) -> int:
    """A statement's first line, from 0, with its decorators."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))]) - 1


def import_line(module: str, names: list[str]) -> str:
    """An import as ruff formats it."""
    ordered = sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    line = f"from {module} import {', '.join(ordered)}"
    if len(line) <= LINE_LENGTH:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in ordered), ")"])


def calls_of(node: ast.AST, name: str) -> list[ast.Call]:
    """The calls of a function or method of that name below a node."""
    calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
    return [call for call in calls if name == getattr(call.func, "attr", getattr(call.func, "id", None))]


def parents_below(node: ast.AST) -> dict[ast.AST, ast.AST]:
    """Each node below a node, with what it is directly part of."""
    return {child: parent for parent in ast.walk(node) for child in ast.iter_child_nodes(parent)}


def unused_after(before: str, after: str) -> list[str]:
    """Names that a module imports or defines for itself and that an edit left without a use."""
    own = {name for name in SourceFile(after).bound_names() if name.startswith("_") or name in _imported(after)}
    return sorted(name for name in own if name in _used(before) and name not in _used(after))


def _imported(text: str) -> set[str]:
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}


def _used(text: str) -> set[str]:
    return set(_names_in(ast.parse(text)))


def _names_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value  # __all__, or an annotation in quotes


def _group(module: str | None) -> str:
    """Isort's section, as far as these files need it."""
    root = (module or "").split(".")[0]
    if root in sys.stdlib_module_names:
        return "standard library"
    return ".".join((module or "").split(".")[:2])
