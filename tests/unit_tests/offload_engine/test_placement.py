# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where the optimizer's state is placed: against every placement of a few buckets, played through one by one."""

import pytest

from megatron.bridge.offload_engine.ceilings import ASSUMED, Ceilings
from megatron.bridge.offload_engine.placement import EVERY_PLACEMENT, choose, device_bytes
from megatron.bridge.offload_engine.prediction import Demand, Placement

pytestmark = pytest.mark.any_core

BUCKET = 1 << 23
NUM_BUCKETS = 16
RESIDENT, STREAMED, BY_HOST = "resident", "streamed", "stepped on by the host"


def _machine(each_way: float, host_adam: float) -> Ceilings:
    return Ceilings(each_way, each_way, 2 * each_way, host_adam, 120e9, host_adam, host_rounding=10e9)


ONE_CORE, AS_H200, MANY_CORES = _machine(45e9, 0.6e9), _machine(45.5e9, 4.1e9), _machine(45e9, 20e9)


def _played(ceilings: Ceilings, places: tuple[str, ...], *, overlaps: bool) -> float:
    """When the last weight is there, if each bucket is handed from one worker to the next, first come, first served."""
    free = dict.fromkeys(("down", "up", "host", "device"), 0.0)
    done: dict[int, float] = {}

    def work(who: str, bucket: int, seconds: float, *, after: float = 0.0) -> None:
        free[who] = max(free[who], done.get(bucket, 0.0), after) + seconds
        done[bucket] = free[who]

    by_host, streamed = ([at for at, place in enumerate(places) if place == of] for of in (BY_HOST, STREAMED))
    for bucket in by_host:
        work("down", bucket, 4 * BUCKET / ceilings.to_host)
    for number, bucket in enumerate(streamed):
        in_the_buffer = done[streamed[number - 2]] if number > 1 else 0.0
        work("up", bucket, 12 * BUCKET / ceilings.to_device, after=in_the_buffer)
        work("device", bucket, BUCKET / ceilings.device_adam)
        work("down", bucket, 12 * BUCKET / ceilings.to_host)
    free["device"] += places.count(RESIDENT) * BUCKET / ceilings.device_adam
    last = 0.0 if overlaps or not by_host else max(done[bucket] for bucket in by_host)
    for bucket in by_host:
        work("host", bucket, BUCKET / ceilings.host_adam, after=last)
    last = 0.0 if overlaps or not by_host else max(done[bucket] for bucket in by_host)
    for bucket in by_host:
        work("up", bucket, 4 * BUCKET / ceilings.to_device, after=last)
    return max([*done.values(), free["device"]])


WHOLE_BUCKETS = {
    Placement(offloaded / NUM_BUCKETS, streamed / max(offloaded, 1)): (
        (STREAMED,) * streamed + (BY_HOST,) * (offloaded - streamed) + (RESIDENT,) * (NUM_BUCKETS - offloaded)
    )
    for offloaded in range(NUM_BUCKETS + 1)
    for streamed in range(offloaded + 1)
}


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("ceilings", [ONE_CORE, AS_H200, MANY_CORES], ids=["1 core", "H200", "many cores"])
@pytest.mark.parametrize("resident_buckets", [0, 6, 10])
def test_no_placement_of_the_buckets_is_much_faster(ceilings, resident_buckets, overlaps):
    buffers = 2 * 12 * BUCKET
    demand = Demand(NUM_BUCKETS * BUCKET, 12 * BUCKET * resident_buckets + buffers, True, overlaps=overlaps)
    choice = choose(ceilings, [demand], WHOLE_BUCKETS)
    played = {
        placement: _played(ceilings, places, overlaps=overlaps)
        for placement, places in WHOLE_BUCKETS.items()
        if 12 * BUCKET * places.count(RESIDENT) + buffers * (STREAMED in places) <= demand.free_bytes
    }
    assert choice.fits and choice.placement in played
    assert played[choice.placement] <= 1.15 * min(played.values())
    assert choice.seconds == pytest.approx(played[choice.placement], rel=0.15)


def test_what_fits_stays_on_the_device():
    assert choose(ASSUMED, [Demand(10**9, 13e9)]).placement == Placement(0.0, 0.0)


def test_few_cores_stream_and_many_do_not():
    demand = Demand(10**9, 1e9, is_precision_aware=True, overlaps=True)
    shares = [choose(ceilings, [demand]).placement.streamed for ceilings in (ONE_CORE, AS_H200, MANY_CORES)]
    assert shares[0] > shares[1] > shares[2] == 0.0


def test_the_rank_with_the_least_room_decides_for_all():
    roomy, tight = Demand(10**9, 100e9), Demand(10**9, 9e9)
    assert choose(ASSUMED, [roomy, tight]) == choose(ASSUMED, [tight, roomy, tight]) == choose(ASSUMED, [tight])
    assert choose(ASSUMED, [roomy, tight]) != choose(ASSUMED, [roomy])


def test_where_nothing_fits_the_least_is_taken():
    choice = choose(ASSUMED, [Demand(10**9, 1e9)])
    assert not choice.fits and choice.placement == Placement(1.0, 0.0) and choice.device_bytes == 4e9


def test_a_recorded_placement_gets_some_slack():
    demand, placement = Demand(10**9, 5e9), Placement(0.9, 0.0)
    needs = device_bytes(demand, placement)
    assert needs == pytest.approx(4e9 + 0.1 * 8e9)
    tight = Demand(10**9, needs - 1)
    assert not choose(ASSUMED, [tight], [placement]).fits
    assert choose(ASSUMED, [tight], [placement], slack_bytes=1).fits


def test_every_placement_is_there_once():
    assert len(set(EVERY_PLACEMENT)) == len(EVERY_PLACEMENT) == 1 + 50 * 51
