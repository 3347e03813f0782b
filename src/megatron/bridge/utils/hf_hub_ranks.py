# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Find a Hugging Face model with all ranks: one rank of each machine fetches it, the others wait."""

from collections.abc import Callable
from pathlib import Path

from megatron.bridge.utils.distributed import all_gathered, run_while_others_wait
from megatron.bridge.utils.hf_hub import find_hf_directory


def find_on_all_ranks(named: Callable[[], str | None], *, option: str) -> Path | None:
    """`find_hf_directory` on all ranks; fetching may take longer than the timeout of collectives. Collective.

    Args:
        named: Gives the hub name, or directory, that this rank needs; None: it needs none.
        option: What named it, for errors.

    Raises:
        FileNotFoundError: This rank has no such directory, and no such model can be fetched.
        ValueError: Machines have the model at different revisions.
        RuntimeError: Another rank failed; has the text of its error.
    """

    def find() -> Path | None:
        name = named()
        try:
            return None if name is None else find_hf_directory(name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{option}: {error}") from error

    directory = run_while_others_wait(find, doing=f"finding {option}")
    is_snapshot = directory is not None and directory.parent.name == "snapshots"
    commits = all_gathered(directory.name if directory is not None and is_snapshot else None)
    found = {commit: commits.index(commit) for commit in commits if commit is not None}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ValueError(
            f"{option} is at revision {one} on rank {first}, and at {other} on rank {second}: fetch one on all "
            "machines (hf download NAME)"
        )
    return directory
