# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a mutant changes in a function: a place found by the names in it, which rewording leaves alone.

Each function here makes a change, which is then applied to the syntax tree of one definition. What it looks for must
be there once; where one expression that fits holds another, the inner one counts.
"""

import ast
from collections.abc import Callable, Iterable, Iterator

Change = Callable[[ast.AST], None]
"""Changes the tree of a function, class or constant in place."""

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class NoTarget(Exception):
    """What is to be changed isn't there once; the message says what."""


def definition(tree: ast.AST, name: str) -> ast.AST:
    """The function, class or assignment of a qualified name, such as `Bucket.place`, or `outer.inner` for a closure."""
    for part in name.split("."):
        tree = _one((node for node in _statements(tree) if part in _names_defined(node)), f"a definition of {part}")
    return tree


def without_call(name: str, *, at: int | None = None) -> Change:
    """A statement that is a call of this function goes; of a call inside another expression its first argument stays.

    Args:
        name: As it is called: `load_state_dict`, or `scheduler.load_state_dict` to tell it from another.
        at: Which one, counted from 0, where it is called more than once.
    """

    def change(target: ast.AST) -> None:
        call = _call_of(target, name, at)
        statement = next((node for node in _inside(target) if _is_no_more_than(node, call)), None)
        if statement is not None:
            _put(target, statement)
        elif call.args:
            _put(target, call, call.args[0])
        elif isinstance(call.func, ast.Attribute):
            _put(target, call, call.func.value)  # of a method, the object
        else:
            raise NoTarget(f"a call of {name} that is a statement or has an argument to stand for it")

    return change


def condition(*words: str, becomes: str = "False", around: str = "") -> Change:
    """Another test of an `if`, a `while`, a conditional expression or a comprehension.

    Args:
        words: Names and values that the test mentions.
        becomes: Stands in its place; `_` in it is the test as it was.
        around: Tests of `if`s around a call of this function only.
    """

    def change(target: ast.AST) -> None:
        if around:
            call = _call_of(target, around)
            tests = {
                node: node.test for node in _inside(target) if isinstance(node, ast.If) and _holds(node.body, call)
            }
        else:
            tests = {test: test for test in _tests(target)}
        fitting = (node for node, test in tests.items() if _mentions(test, words))
        test = tests[_one(fitting, f"a condition {_with(words)}{around and f' around {around}'}")]
        new = _expression(becomes)
        holder = ast.Expr(new)
        for name in [node for node in ast.walk(new) if isinstance(node, ast.Name) and node.id == "_"]:
            _put(holder, name, test)
        _put(target, test, holder.value)

    return change


def value(name: str | int, becomes: str, *, of: str = "") -> Change:
    """Another value for a variable or attribute that is assigned, an argument that is passed, or a key of a dict.

    Args:
        name: Its name; or its position, in the call of `of`.
        becomes: The value.
        of: Arguments of this call only.
    """

    def change(target: ast.AST) -> None:
        if isinstance(name, int):
            found = _call_of(target, of).args[name : name + 1]
        elif of:
            found = [keyword.value for keyword in _call_of(target, of).keywords if keyword.arg == name]
        else:
            found = [given for to, given in _values(target) if to == name]
        _put(target, _one(found, f"a value of {name}{of and f' of {of}'}"), _expression(becomes))

    return change


def expression(old: str, new: str) -> Change:
    """Another expression, name or constant in the place of one that is read: for what no other change can say."""

    def change(target: ast.AST) -> None:
        wanted = ast.dump(_expression(old))
        found = (node for node in _inside(target) if isinstance(node, ast.expr) and ast.dump(node) == wanted)
        _put(target, _one(found, f"the expression {old}"), _expression(new))

    return change


def without_operand(*words: str) -> Change:
    """An operand that mentions these goes, of `and`, `or`, `+`, `-`, `&` or `|`."""

    def change(target: ast.AST) -> None:
        operands = {operand: node for node in _inside(target) for operand in _operands(node)}
        operand = _one((one for one in operands if _mentions(one, words)), f"an operand {_with(words)}")
        node = operands[operand]
        rest = [other for other in _operands(node) if other is not operand]
        if len(rest) == 1:
            _put(target, node, rest[0])
        else:
            _put(node, operand)

    return change


def without_element(*words: str) -> Change:
    """An element that mentions these goes, of a tuple, list, set or dict that is written out."""

    def change(target: ast.AST) -> None:
        displays = (ast.Tuple, ast.List, ast.Set)
        elements = {one: node for node in _inside(target) if isinstance(node, displays) for one in node.elts}
        elements |= {one: node for node in _inside(target) if isinstance(node, ast.Dict) for one in node.values}
        element = _one((one for one in elements if _mentions(one, words)), f"an element {_with(words)}")
        node = elements[element]
        if isinstance(node, ast.Dict):
            del node.keys[node.values.index(element)]
        _put(node, element)

    return change


def returning(result: str) -> Change:
    """The function returns this at once."""

    def change(target: ast.AST) -> None:
        if not isinstance(target, _SCOPES[:2]):
            raise NoTarget("a function")
        target.body = [ast.Return(_expression(result))]

    return change


def moved(name: str, *, before: str) -> Change:
    """The statement with a call of one function goes before the one with a call of another, in their common block."""

    def change(target: ast.AST) -> None:
        calls = _call_of(target, name), _call_of(target, before)
        blocks = [
            block
            for node in (target, *_inside(target))
            for _, block in ast.iter_fields(node)
            if isinstance(block, list) and all(_holds(block, call) for call in calls)
        ]
        block = blocks[-1]  # the innermost, in the order of a walk
        ours, theirs = (next(at for at, one in enumerate(block) if _holds([one], call)) for call in calls)
        if ours <= theirs:
            raise NoTarget(f"a call of {name} behind that of {before}")
        block.insert(theirs, block.pop(ours))

    return change


def several(*changes: Change) -> Change:
    """One after the other."""

    def change(target: ast.AST) -> None:
        for one in changes:
            one(target)

    return change


def _one(found: Iterable[ast.AST], what: str) -> ast.AST:
    nodes = list(found)
    inner = [node for node in nodes if not any(other is not node and _holds([node], other) for other in nodes)]
    if len(inner) != 1:
        raise NoTarget(f"{what} is there {len(inner)} times, not once")
    return inner[0]


def _call_of(target: ast.AST, name: str, at: int | None = None) -> ast.Call:
    calls = (node for node in _inside(target) if isinstance(node, ast.Call))
    found = [call for call in calls if f".{ast.unparse(call.func)}".endswith(f".{name}")]
    if at is not None:
        found = sorted(found, key=lambda call: (call.lineno, call.col_offset))[at : at + 1]
    return _one(found, f"a call of {name}")


def _inside(target: ast.AST) -> Iterator[ast.AST]:
    """All of a definition but its signature and decorators."""
    for part in target.body if isinstance(target, _SCOPES) else [target]:
        yield from ast.walk(part)


def _statements(scope: ast.AST) -> Iterator[ast.AST]:
    """Those of a module, function or class, without those of the functions and classes in it."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            yield node
            if not isinstance(node, _SCOPES):
                yield from _statements(node)


def _names_defined(node: ast.AST) -> list[str]:
    return [node.name] if isinstance(node, _SCOPES) else [name for name, _ in _assigned(node)]


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for to in targets:
        if isinstance(to, ast.Name | ast.Attribute) and node.value is not None:
            yield to.id if isinstance(to, ast.Name) else to.attr, node.value
        elif isinstance(to, ast.Subscript) and isinstance(to.slice, ast.Constant):
            yield str(to.slice.value), node.value


def _values(target: ast.AST) -> Iterator[tuple[str | None, ast.AST]]:
    for node in _inside(target):
        yield from _assigned(node)
        if isinstance(node, ast.keyword):
            yield node.arg, node.value
        elif isinstance(node, ast.Dict):
            yield from (
                (str(key.value), given)
                for key, given in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            )


def _tests(target: ast.AST) -> Iterator[ast.AST]:
    for node in _inside(target):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs


def _operands(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.BoolOp):
        return node.values
    is_sum = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.BitAnd | ast.BitOr)
    return [node.left, node.right] if is_sum else []


def _is_no_more_than(node: ast.AST, call: ast.Call) -> bool:
    """Whether a statement is the call, raises what it gives, or counts that on."""
    if isinstance(node, ast.Raise):
        return node.exc is call
    if isinstance(node, ast.AugAssign):
        return _holds([node.target], call)
    return isinstance(node, ast.Expr) and call in (node.value, getattr(node.value, "value", None))


def _mentions(node: ast.AST, words: Iterable[str]) -> bool:
    said = set()
    for part in ast.walk(node):
        said |= {str(getattr(part, field)) for field in ("id", "attr", "arg", "value") if hasattr(part, field)}
    return said.issuperset(words)


def _with(words: tuple[str, ...]) -> str:
    return f"with {', '.join(words)}"


def _holds(nodes: Iterable[object], wanted: ast.AST) -> bool:
    return any(part is wanted for node in nodes if isinstance(node, ast.AST) for part in ast.walk(node))


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _put(tree: ast.AST, old: ast.AST, *new: ast.AST) -> None:
    """Put one node, or none, in the place of another, which is found by identity."""
    for node in ast.walk(tree):
        for field, content in ast.iter_fields(node):
            if content is old:
                setattr(node, field, new[0])
                return
            if isinstance(content, list) and any(one is old for one in content):
                at = next(at for at, one in enumerate(content) if one is old)
                content[at : at + 1] = new
                if field == "body" and not content:
                    content.append(ast.Pass())
                return
