# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Who reads which configuration field, found in the source: attributes of values that are known to be sections.

A value is known to be a section where it is an attribute of that name (`cfg.train`), an argument with the class, or a
protocol that it fits, as its annotation, `self` in the class's own methods, or a name or attribute to which one of
these was assigned. An attribute of anything else, or a key of a saved configuration, counts only if no other class has
one of that name. A check or a display of a field is no reader.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

NO_READERS = (
    "config/rules/*.py",
    "config/unsupported.py",
    "config/precedence.py",
    "monitoring/summary.py",
    "utils/unbuilt_options.py",
)
"""Files that refuse, log or show values."""


class Readers:
    """The fields that are read somewhere, as `(class name, field)`."""

    def __init__(self, source: Path, sections: Mapping[str, set[str]], fields: Mapping[str, set[str]]) -> None:
        """Read all files.

        Args:
            source: Directory of the package.
            sections: Names of the attributes that hold a section, each with the names of its classes.
            fields: Names of the configuration classes, each with its fields.
        """
        self.sections, self.fields = sections, fields
        self.found: set[tuple[str, str]] = set()
        trees = {path: ast.parse(path.read_text()) for path in sorted(source.rglob("*.py"))}
        self.kinds = {name: {name} for name in fields}  # what a name in an annotation may be
        for name, members in _protocols(trees.values()):
            self.kinds[name] = {cls for cls, names in fields.items() if members <= names}
        self._elsewhere = {name for tree in trees.values() for name in _attributes_of_other_classes(tree, self.kinds)}
        for path, tree in trees.items():
            if not any(path.match(pattern) for pattern in NO_READERS):
                _File(self, tree).read()

    def note(self, classes: set[str] | None, name: str) -> None:
        """A field was read; of an unknown value, None."""
        if classes is None:
            classes = set(self.fields) if name not in self._elsewhere else set()
        self.found |= {(cls, name) for cls in classes if name in self.fields.get(cls, ())}


class _File(ast.NodeVisitor):
    """One file's reads."""

    def __init__(self, readers: Readers, tree: ast.Module) -> None:
        self.readers, self.tree = readers, tree
        self.known: dict[str, set[str]] = {}  # what names and `self.name` are
        self.imported = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        self.asks_by_name = any(_is_getattr(node) and not _constant_name(node) for node in ast.walk(tree))

    def read(self) -> None:
        for _ in range(2):  # an attribute may be assigned below its use
            self.visit(self.tree)
        if self.asks_by_name:  # getattr(section, name): each name that stands in the file
            for text in _texts(self.tree):
                for word in text.split():
                    self.readers.note(None, word)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before = self.known.get("self")
        bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
        is_config = node.name in self.readers.fields
        known_bases = bases & set(self.readers.fields)
        self.known["self"] = ({node.name} if is_config else set()) | known_bases
        self.generic_visit(node)
        self.known["self"] = before or set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if self.known.get("self") and _is_check(node):
            return
        outer = dict(self.known)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            words = _words(argument.annotation)
            if words & set(self.readers.kinds):
                named = [self.readers.kinds[word] for word in words if word in self.readers.kinds]
                self.known[argument.arg] = set().union(*named)
            elif argument.annotation is not None and argument.arg != "self" and words - {"Any"}:
                self.known[argument.arg] = set()  # something else
            elif argument.arg != "self":
                self.known.pop(argument.arg, None)
        self.generic_visit(node)
        kept = {name: value for name, value in self.known.items() if name.startswith("self.")}
        self.known = {**outer, **kept}

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                text, classes = ast.unparse(name), self._classes(value)
                if classes and (isinstance(name, ast.Name) or text.startswith("self.")):
                    self.known[text] = classes
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.readers.note(self._classes(node.value), node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _is_getattr(node) and _constant_name(node):
            self.readers.note(self._classes(node.args[0]), _constant_name(node))
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
            if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                self.readers.note(None, node.args[0].value)
        self.generic_visit(node)

    def _classes(self, value: ast.expr) -> set[str] | None:
        """The configuration classes that an expression may be; none if it is something else, None if unknown."""
        text = ast.unparse(value)
        if text in self.known:
            return self.known[text]
        if text in self.imported:
            return set()
        if isinstance(value, ast.Attribute) and value.attr in self.readers.sections:
            return self.readers.sections[value.attr]
        if isinstance(value, ast.BoolOp):
            known = [classes for classes in map(self._classes, value.values) if classes]
            return set().union(*known) if known else None
        return None


def _protocols(trees: Iterable[ast.Module]) -> Iterator[tuple[str, set[str]]]:
    """Names of the protocols, and of what they have."""
    for cls in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        if any(ast.unparse(base) == "Protocol" for base in cls.bases):
            yield cls.name, {node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)}


def _attributes_of_other_classes(tree: ast.Module, kinds: Mapping[str, set[str]]) -> Iterator[str]:
    """Names of fields, methods and attributes of the classes that are no configuration."""
    ifs = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    # In such a block a mixin says what the class has that it is mixed into.
    of_others = {inner for block in ifs if ast.unparse(block.test) == "TYPE_CHECKING" for inner in ast.walk(block)}
    for cls in ast.walk(tree):
        if isinstance(cls, ast.ClassDef) and cls.name not in kinds:
            for node in set(ast.walk(cls)) - of_others:
                if isinstance(node, ast.FunctionDef):
                    yield node.name
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    yield node.target.id
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    if ast.unparse(node.value) == "self":
                        yield node.attr


def _is_getattr(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"


def _is_check(function: ast.FunctionDef) -> bool:
    """Whether a configuration class's method only checks its fields."""
    return function.name == "finalize" or function.name.startswith(("check", "_check"))


def _constant_name(call: ast.Call) -> str | None:
    name = call.args[1]
    return name.value if isinstance(name, ast.Constant) else None


def _words(annotation: ast.expr | None) -> set[str]:
    text = "" if annotation is None else ast.unparse(annotation)
    return {word for word in "".join(c if c.isalnum() or c == "_" else " " for c in text).split() if word != "None"}


def _texts(tree: ast.Module) -> Iterator[str]:
    """The texts of a file, without docstrings, errors and what is in checks."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if (isinstance(node, ast.FunctionDef) and _is_check(node)) or isinstance(node, ast.Raise | ast.JoinedStr):
            skipped |= {id(inner) for inner in ast.walk(node)}
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value
