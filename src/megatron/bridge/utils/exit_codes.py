# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Exit codes of a rank besides 0 (done) and 1 (an error, in the last line of its traceback)."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO, cast

PREEMPTED = 75
"""A signal stopped the run after its checkpoint was saved: start it again (EX_TEMPFAIL of sysexits.h).

Megatron-LM ends with 0 in this case, which a script can't tell from a finished run.
"""

INTERRUPTED = 130
"""SIGINT ended the run: as a shell would say it, 128 + SIGINT."""

HUNG = 124
"""A rank made no progress within the timeout. Its stacks are in its log. The same code as that of coreutils' `timeout`.
"""


def exit_code_of(command: str, run: Callable[[], None]) -> int:
    """Run a command and return 0, or 1 after an error that a user can fix, which is written to stderr as one line."""
    try:
        run()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.stderr.write(f"{command}: {error}\n")
        return 1
    return 0


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """End the process with a command's exit status. Ends silently if the reader of its output is gone (`| head`).

    Where its output can't be written for another reason, such as a full disk, one line on stderr says so.

    Args:
        main: Runs the command and returns its exit status.

    Raises:
        SystemExit: Always; as a shell would say it, 128 + SIGPIPE, where nobody reads any more; 1 where the output
            can't be written.
    """
    status: str | int | None
    try:
        with _errors_of_writing(sys.stdout) as errors:
            try:
                status = main()
            except SystemExit as ended:  # argparse's
                status = ended.code
        if errors:
            raise errors[0]
        if sys.stdout is not None:  # `>&-` closed it
            sys.stdout.flush()
    except OSError:
        refusal = _refusal_of_output()
        if refusal is None:  # it was another file's
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        status = 141
        if not isinstance(refusal, BrokenPipeError):
            sys.stderr.write(f"standard output can't be written ({refusal.strerror}): send it elsewhere\n")
            status = 1
    raise SystemExit(status)


@contextlib.contextmanager
def _errors_of_writing(stdout: TextIO | None) -> Iterator[list[OSError]]:
    """Note the errors of writing to standard output: argparse swallows those of its --help."""
    errors: list[OSError] = []
    if stdout is None:
        yield errors
        return
    with contextlib.redirect_stdout(cast(TextIO, _NotingErrors(stdout, errors))):
        yield errors


class _NotingErrors:
    """A stream that notes each OSError of a write before it raises it."""

    def __init__(self, stream: TextIO, errors: list[OSError]) -> None:
        self._stream, self._errors = stream, errors

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._errors.append(error)
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _refusal_of_output() -> OSError | None:
    """The error of writing to standard output, which still buffers what it couldn't write; None if writing works."""
    if sys.stdout is None:
        return None
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        return error
    return None
