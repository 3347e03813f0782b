# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Ranks meet those of their own start, whatever earlier ones left in the store."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron.bridge.utils.rendezvous import store_of_this_start

pytestmark = pytest.mark.any_core

RANKS = 3


def _meet(store, ranks, delays, timeout=300.0):
    """What each of these ranks, which come some seconds late, has for a store, or the error's text."""
    found = {}

    def come(rank):
        threading.Event().wait(delays[rank])
        try:
            found[rank] = store_of_this_start(store, rank, RANKS, timedelta(seconds=timeout))
        except RuntimeError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("latest", [0, 1])
def test_ranks_of_a_start_meet_behind_one_that_is_over(latest):
    store = dist.HashStore()
    _meet(store, range(RANKS), [0, 0, 0])
    delays = [0.0] * RANKS
    delays[latest] = 0.3
    stores = _meet(store, range(RANKS), delays)
    stores[0].set("address", "mine")
    assert [stores[rank].get("address") for rank in range(RANKS)] == [b"mine"] * RANKS
    again = _meet(store, range(RANKS), delays)
    assert not any(again[rank].check(["address"]) for rank in range(RANKS))


def test_a_start_that_was_never_complete_is_in_nobodys_way():
    store = dist.HashStore()
    _meet(store, [0, 1], [0, 0], timeout=0.3)  # rank 2 died as it was imported
    stores = _meet(store, range(RANKS), [0.3, 0, 0])
    stores[0].set("address", "mine")
    assert [stores[rank].get("address") for rank in range(RANKS)] == [b"mine"] * RANKS


def test_a_rank_without_a_rank_0_ends():
    found = _meet(dist.HashStore(), [1], [0, 0, 0], timeout=0.2)
    assert found == {1: "rank 0 of this start didn't come, or missed another rank"}
