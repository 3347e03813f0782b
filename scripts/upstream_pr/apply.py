# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Apply the pull request of docs/upstream-pr.md to a checkout of Megatron Bridge, or undo it."""

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pieces
from edits import Change, edit_checkpointing, edit_optim, edit_setup
from source_edits import Misfit

TRAINING = "src/megatron/bridge/training"
TESTS = "tests/unit_tests/training"
EDITED: dict[str, Callable[[str], Change]] = {
    f"{TRAINING}/checkpointing.py": edit_checkpointing,
    f"{TRAINING}/setup.py": edit_setup,
    f"{TRAINING}/optim.py": edit_optim,
}
NEW: dict[str, Callable[[], str]] = {
    f"{TRAINING}/hybrid_param_copies.py": pieces.lifted_module,
    f"{TESTS}/test_hybrid_param_copies.py": pieces.mocked_tests,
    f"{TESTS}/test_masters_after_load.py": pieces.tests_of_the_call,
}
PAGE = "cpu-offloading.md"
RECORD = ".upstream_pr_undo.json"
LEFT = (
    f"{TESTS}/test_optim.py, test_setup.py: tests of the sync that went",
    f"{TRAINING}/hybrid_param_copies.py: the other repository's header, which a person signs over",
    "a commit with a DCO sign-off; docs/upstream-pr.md has the title, the labels and the text",
)


class CannotApply(Exception):
    """Nothing was changed; the message says why."""


class Application:
    """What is written into a checkout, all at once, after everything is known."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.writes: dict[str, bytes] = {}
        self.applied: list[str] = []
        self.misfits: list[str] = []
        self.notes: list[str] = []

    def edit(self, path: str, change_of: Callable[[str], Change]) -> None:
        """Plan a file's change; what it misses is kept for the report."""
        if not (self.checkout / path).is_file():
            self.misfits.append(f"{path}: is missing")
            return
        before = (self.checkout / path).read_bytes()
        try:
            change = change_of(before.decode())
            compile(change.text, path, "exec")
        except (Misfit, SyntaxError, UnicodeDecodeError) as error:
            self.misfits.append(f"{path}: {error}")
            return
        self.writes[path] = change.text.encode()
        self.applied += [f"{path}: {text}" for text in change.applied]
        self.misfits += [f"{path}: {text}" for text in change.misfits]
        self.notes += [f"{path}: {text}" for text in change.notes]

    def add(self, path: str, text: str) -> None:
        """Plan a new file."""
        if (self.checkout / path).parent.is_dir():
            self.writes[path] = text.encode()
            self.applied.append(f"{path}: new, {text.count(chr(10))} lines")
        else:
            self.misfits.append(f"{path}: its folder is missing")

    def document(self) -> None:
        """Plan a section at the end of the page on offloading."""
        pages = sorted((self.checkout / "docs").rglob(PAGE))
        if len(pages) != 1:
            self.misfits.append(f"docs/: {PAGE} is there {len(pages)} times, not once; document the rule by hand")
            return
        path = pages[0].relative_to(self.checkout).as_posix()
        before = pages[0].read_bytes()
        newline = b"\r\n" if b"\r\n" in before else b"\n"
        section = pieces.DOCUMENT.encode().replace(b"\n", newline)
        self.writes[path] = before + (b"" if before.endswith(b"\n") else newline) + section
        self.applied.append(f"{path}: a section at its end")

    def write(self) -> None:
        """Write the record that undoes it, and then all files."""
        files = {}
        for path, after in self.writes.items():
            before = (self.checkout / path).read_bytes() if (self.checkout / path).exists() else None
            encoded = None if before is None else base64.b64encode(before).decode()
            files[path] = {"before": encoded, "after": hashlib.sha256(after).hexdigest()}
        record_of(self.checkout).write_text(json.dumps(files, indent=1), encoding="utf-8")
        for path, after in self.writes.items():
            (self.checkout / path).write_bytes(after)


def record_of(checkout: Path) -> Path:
    """Where it is kept what was there before: out of Git's sight where it can be."""
    return (checkout / ".git" if (checkout / ".git").is_dir() else checkout) / RECORD


def apply(checkout: Path) -> Application:
    """Apply all that fits.

    Raises:
        CannotApply: It is no such checkout, it was done before, or a new file's name is taken.
    """
    if not (checkout / TRAINING / "checkpointing.py").is_file():
        raise CannotApply(f"{checkout} is no checkout of Megatron Bridge: {TRAINING}/checkpointing.py is missing")
    if record_of(checkout).exists():
        raise CannotApply(f"{checkout} has it already: take it out first, with --undo")
    taken = [path for path in NEW if (checkout / path).exists()]
    if taken or pieces.SYNC in (checkout / TRAINING / "checkpointing.py").read_text(encoding="utf-8", errors="replace"):
        what = taken[0] if taken else f"{pieces.SYNC} in {TRAINING}/checkpointing.py"
        raise CannotApply(f"{checkout} has {what} already, and not from this script: start from a clean checkout")
    application = Application(checkout)
    for path, change_of in EDITED.items():
        application.edit(path, change_of)
    for path, text_of in NEW.items():
        application.add(path, text_of())
    application.document()
    application.write()
    return application


def undo(checkout: Path) -> list[str]:
    """Give every file the bytes that it had; returns their paths.

    Raises:
        CannotApply: There is nothing to undo, or a file was changed since.
    """
    record = record_of(checkout)
    if not record.is_file():
        raise CannotApply(f"{checkout} has nothing to undo: {record.name} is missing")
    files = json.loads(record.read_text(encoding="utf-8"))
    before = {path: one["before"] and base64.b64decode(one["before"]) for path, one in files.items()}
    changed = [path for path, one in files.items() if not _is_known(checkout / path, before[path], one["after"])]
    if changed:
        raise CannotApply(f"changed since: {', '.join(changed)}; undo it with git, and remove {record}")
    for path, content in before.items():
        if content is None:
            (checkout / path).unlink(missing_ok=True)
        else:
            (checkout / path).write_bytes(content)
    record.unlink()
    return list(files)


def _is_known(path: Path, before: bytes | None, after: str) -> bool:
    """Whether a file is as it was applied, or as it was before."""
    content = path.read_bytes() if path.is_file() else None
    return content == before or (content is not None and hashlib.sha256(content).hexdigest() == after)


def main() -> int:
    """0: all of it was applied, or undone; 1: something didn't fit; 2: nothing was changed."""
    parser = argparse.ArgumentParser(prog="scripts/make_upstream_pr.sh", description=__doc__)
    parser.add_argument("checkout", metavar="CHECKOUT", type=Path, help="the root of a checkout of Megatron Bridge")
    parser.add_argument("--undo", action="store_true", help="restore all files")
    options = parser.parse_args()
    try:
        if options.undo:
            print("\n".join(f"as before: {path}" for path in undo(options.checkout)))
            return 0
        application = apply(options.checkout)
    except CannotApply as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for heading, lines in (
        ("applied", application.applied),
        ("didn't fit", application.misfits),
        ("to look at", application.notes),
        ("left to you", LEFT),
    ):
        print("".join(f"{heading}: {line}\n" for line in lines), end="")
    return 1 if application.misfits else 0


if __name__ == "__main__":
    sys.exit(main())
