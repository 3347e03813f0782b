# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What changes in the three files of a checkout of Megatron Bridge, found by names of functions and calls."""

import ast
from dataclasses import dataclass, field

from pieces import DOOR, DOOR_SOURCE, HELPER, HELPER_SOURCE, MODULE, SYNC, sync_source
from source_edits import Misfit, SourceFile, calls_of, first_line, parents_below, unused_after

LOADS = ("_load_checkpoint_from_path", "_load_hf_pretrained_checkpoint")
"""The two places where it is known that no optimizer state was restored."""

RELOAD = "reload_model_params"
LARGEST_CALL_LINES = 20
"""A statement around the old sync that is longer does more than that."""


@dataclass
class Change:
    """A file's new text, and what there was to say about it."""

    text: str
    applied: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def edit_checkpointing(text: str) -> Change:
    """Define the sync and its helper beside `load_checkpoint`, and call the helper after each load's reload."""
    source, change = SourceFile(text), Change(text)
    source.import_name("collections.abc", "Mapping")
    source.import_name("megatron.core.optimizer.optimizer", "MegatronOptimizer")
    source.import_name("megatron.bridge.training.config", "ConfigContainer")
    source.import_name(MODULE, "HybridParamSync", "check_hybrid_optimizer_param_copies", "rebuild_param_copies")
    source.insert(source.function("load_checkpoint").end_lineno, f"\n\n{sync_source()}\n\n{HELPER_SOURCE}")
    change.applied.append(f"{SYNC} and {HELPER} beside load_checkpoint")
    for name in LOADS:
        try:
            change.applied.append(_call_after_reload(source, source.function(name), change.misfits))
        except Misfit as misfit:
            change.misfits.append(
                f"{misfit}; where {name} has restored no optimizer state, call {HELPER}(cfg, optimizer, state_dict) "
                f"after {RELOAD}"
            )
    change.text = source.edited()
    return change


def _call_after_reload(source: SourceFile, function: ast.FunctionDef, misfits: list[str]) -> str:
    """Plan the call after all that reloads in a function; returns what was applied."""
    calls = calls_of(function, RELOAD)
    parents = parents_below(function)
    places = {_after_what(source, function, parents, call, misfits) for call in calls}
    if len(places) != 1:
        raise Misfit(f"{function.name} calls {RELOAD} in {len(places)} places, not one")
    statement, conditions = places.pop()
    given = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "state_dict"]
    given += [call.args[0] for call in calls if call.args]
    given = [calls[0].func.value, *given[:1]]
    line = f"{HELPER}({', '.join([_configuration(function), *map(ast.unparse, given)])})"
    indent = " " * statement.col_offset
    if conditions:
        source.insert(statement.end_lineno, f"{indent}if {' and '.join(conditions)}:\n{indent}    {line}")
    else:
        source.insert(statement.end_lineno, f"{indent}{line}")
    return f"a call in {function.name}, after line {statement.end_lineno}"


def _after_what(
    source: SourceFile, function: ast.FunctionDef, parents: dict, call: ast.Call, misfits: list[str]
) -> tuple[ast.stmt, tuple[str, ...]]:
    """The statement that the call comes after, and conditions that it must keep.

    The reload stands under conditions on precision, which the sync of an FP32 model must not share; whether optimizer
    state was restored is what it must.
    """
    statement = call
    while not isinstance(statement, ast.stmt):
        statement = parents[statement]
    while isinstance(parents[statement], ast.If):
        outer = parents[statement]
        other = outer.orelse if statement in outer.body else outer.body
        if other and not any(calls_of(node, RELOAD) for node in other):
            break  # the other branch restores the optimizer
        kept, of_precision = _conditions(outer.test)
        if other:
            kept = []  # it reloads in both branches
        elif kept and not of_precision:
            break
        if _is_elif(source, outer):
            reason = (
                f"{function.name} reloads in an elif (line {outer.lineno}): the call is under its condition, so an "
                "offloaded FP32 model isn't synced; make it an else"
            )
            misfits += [] if reason in misfits else [reason]
            break
        statement = outer
        if kept:
            return statement, tuple(kept)
    return statement, ()


def _conditions(test: ast.expr) -> tuple[list[str], bool]:
    """The parts of a condition that aren't the helper's own or about precision; whether any is about precision."""
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    kept, of_precision = [], False
    for part in parts:
        names = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(part)} - {None}
        if names & {"fp16", "bf16"}:
            of_precision = True
        elif names != {"optimizer"} and "use_megatron_fsdp" not in names:
            kept.append(f"({ast.unparse(part)})" if isinstance(part, ast.BoolOp) else ast.unparse(part))
    return kept, of_precision


def _is_elif(source: SourceFile, node: ast.If) -> bool:
    return source.lines[node.lineno - 1].strip().startswith("elif")


def _configuration(function: ast.FunctionDef) -> str:
    """How a function names the run's configuration."""
    bound = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    bound |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if "cfg" in bound:
        return "cfg"
    if "state" in bound:
        return "state.cfg"
    raise Misfit(f"{function.name} has neither cfg nor state")


def edit_setup(text: str) -> Change:
    """Take out the sync after every load, and its import."""
    source, change = SourceFile(text), Change(text)
    parents = parents_below(source.tree)
    calls = calls_of(source.tree, DOOR)
    if len(calls) != 1:
        raise Misfit(f"{DOOR} is called {len(calls)} times, not once; take out the sync after every load by hand")
    statement = calls[0]
    while not isinstance(statement, ast.stmt):
        statement = parents[statement]
    while _is_about_offload(parents[statement]) or _is_all_of(parents[statement], statement):
        statement = parents[statement]
    alone = _block_of(parents[statement], statement) == [statement]
    num_lines = statement.end_lineno - first_line(statement)
    loads = any(calls_of(statement, name) for name in ("load", "load_checkpoint"))
    if isinstance(statement, ast.Assign) or alone or loads or num_lines > LARGEST_CALL_LINES:
        raise Misfit(
            f"the call of {DOOR} (line {calls[0].lineno}) isn't a statement of its own; take it and what belongs to it "
            "out by hand"
        )
    source.replace(statement, "", with_comment=True)
    lines = f"lines {first_line(statement) + 1} to {statement.end_lineno}"
    change.applied.append(f"without the sync after every load ({lines})")
    _without_import(source)
    change.text = source.edited()
    change.notes += [f"{name} has no use left" for name in unused_after(text, change.text)]
    return change


def _is_about_offload(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and not node.orelse and "optimizer_cpu_offload" in ast.unparse(node.test)


def _is_all_of(node: ast.AST, statement: ast.stmt) -> bool:
    return isinstance(node, ast.If) and not node.orelse and node.body == [statement]


def _block_of(parent: ast.AST, statement: ast.stmt) -> list[ast.stmt]:
    blocks = (getattr(parent, name, None) for name in ("body", "orelse", "finalbody"))
    return next(block for block in blocks if isinstance(block, list) and statement in block)


def _without_import(source: SourceFile) -> None:
    """Take the old sync's name out of what is imported; the lines of other names stay as they are."""
    for node in source.tree.body:
        if isinstance(node, ast.ImportFrom) and DOOR in [alias.name for alias in node.names]:
            if len(node.names) == 1:
                source.edits.append((first_line(node), node.end_lineno, []))
                return
            alias = next(alias for alias in node.names if alias.name == DOOR)
            if source.lines[alias.lineno - 1].strip().rstrip(",") == DOOR:
                source.edits.append((alias.lineno - 1, alias.lineno, []))
            else:
                source.replace(node, ast.unparse(_without(node, alias)))
            return
    raise Misfit(f"{DOOR} is called and not imported by name")


def _without(node: ast.ImportFrom, alias: ast.alias) -> ast.ImportFrom:
    return ast.ImportFrom(node.module, [other for other in node.names if other is not alias], node.level)


def edit_optim(text: str) -> Change:
    """Let the old sync call the new one."""
    source, change = SourceFile(text), Change(text)
    source.replace(source.function(DOOR), DOOR_SOURCE)
    source.import_name("megatron.core.optimizer.optimizer", "MegatronOptimizer")
    source.import_name(MODULE, "rebuild_param_copies")
    change.applied.append(f"{DOOR} only calls {SYNC}")
    change.text = source.edited()
    change.notes += [f"{name} has no use left" for name in unused_after(text, change.text)]
    return change
