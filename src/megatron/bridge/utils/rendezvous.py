# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Let the ranks of one start find each other, and not those of an earlier start.

torchrun keeps one store through all restarts (`--max-restarts`), and in torch 2.13 all starts use the same keys. A
fast rank finds the address of a dead process, and the restart fails ("Gloo connectFullMesh failed ... Connection
refused"). The restart number doesn't help, because each machine has its own count.
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

SECONDS_BETWEEN_LOOKS = 0.05


def is_shared_by_starts() -> bool:
    """Whether the store that torchrun names in the environment may hold keys of an earlier start."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_of_this_start(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of the store that only the ranks of this start use. Call on all ranks.

    Rank 0 draws a random name. Each other rank answers under that name with a random word of its own, and rank 0
    publishes all words. A rank that has read the name of an earlier start doesn't find its word and tries again.

    Args:
        store: Shared by all starts.
        rank: This process's.
        world_size: How many there are.
        timeout: How long to wait for the others.

    Raises:
        RuntimeError: Not all ranks came within the timeout.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("this start", name)
        answers = [f"{name}/{other}" for other in range(1, world_size)]
        if answers:
            store.wait(answers, timeout)
        store.set(f"{name}/all", " ".join(store.get(key).decode() for key in answers))
        return dist.PrefixStore(name, store)
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if store.check(["this start"]):
            name = store.get("this start").decode()
            store.set(f"{name}/{rank}", word)
            if store.check([f"{name}/all"]) and word in store.get(f"{name}/all").decode().split():
                return dist.PrefixStore(name, store)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise RuntimeError("rank 0 of this start didn't come, or missed another rank")
