# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""One cell of the sync's matrix, on the ranks: a model, an offloaded optimizer, and every way that weights come in.

Each way starts from random weights and an optimizer built on them. Then the weights come in, and three things must
hold, bit-exact:

1. every tensor that a sub-optimizer steps on, and every FP32 shard, equals its weight;
2. a step with learning rate 0 leaves every weight;
3. three steps equal those of the run whose weights were in place when its optimizer was built. Without CUDA that run
   equals, in turn, the run without offload.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.rigs.in_streams import streams_in
from tests.rigs.on_ranks import differing, fill_weights, weights_of
from tests.rigs.sync import STEPS, Cell, Rig, Run, Stepper, Trace, config, offload_options, start

ADAMS_APART = 2 * STEPS * 1e-3
"""On CUDA, how far a weight may be from the run without offload: the CPU's Adam and the GPU's round differently, and a
gradient near zero may then move its weight by a learning rate (1e-3) a step in the other direction."""

WAYS = {
    "pretrained checkpoint": {"pretrained_checkpoint": "pretrained"},
    "finetune=True": {"load": "full", "finetune": True},
    "load_optim=False": {"load": "full", "load_optim": False},
    "checkpoint without optimizer state": {"load": "no_optim"},
    "release checkpoint": {"load": "released"},
    "local checkpoint": {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": "local"},
    "Hugging Face directory": {"pretrained_checkpoint": "hf"},
    "FP32 checkpoint": {"pretrained_checkpoint": "fp32", "load_main_params_from_ckpt": True, "load_optim": False},
    "running process": {},
    "frozen base": {},
}
"""How the weights come in, as options of `checkpoint`; paths lie below the model's directory."""
SCALED = 1 + 1e-4
"""An FP32 checkpoint's weights over their 16-bit rounding: too small a step to round to another one."""


def load(run: Run) -> None:
    """`load_checkpoint`, as a starting run calls it."""
    from megatron.bridge.training.checkpointing import load_checkpoint
    from megatron.bridge.training.state import GlobalState

    load_checkpoint(GlobalState(run.cfg), run.model, run.optimizer, run.scheduler)


def copies_and_weights(optimizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(copy, this rank's slice of the weight) for all that the sub-optimizers step on and for every FP32 shard.

    Read from Core's own books, not through the code under test.
    """
    pairs = []
    for child in optimizer.chained_optimizers:
        if child.optimizer is None:
            continue
        groups = (child.model_float16_groups, child.shard_float16_groups, child.shard_fp32_from_float16_groups)
        rows = [row for group in zip(*groups, strict=True) for row in zip(*group, strict=True)]
        for models, shards in zip(child.model_fp32_groups, child.shard_fp32_groups, strict=True):
            rows += [(param, shard, None) for param, shard in zip(models, shards, strict=True)]
        weight_of = {}
        for param, shard, main in rows:
            owned = child._get_model_param_range_map(param)["param"]
            weight = param.detach().view(-1)[owned.start : owned.end]
            weight_of[shard if main is None else main] = weight
            pairs += [] if main is None else [(main, weight)]
        inner_to_given = getattr(child.optimizer, "inner_param_to_orig_param", {})
        for part in getattr(child.optimizer, "sub_optimizers", []):
            for inner in (param for group in part.param_groups for param in group["params"]):
                pairs.append((inner, weight_of[inner_to_given[inner]]))
    assert pairs, "nothing is stepped on"
    return pairs


def moments(optimizer: Any) -> list[torch.Tensor]:
    """Adam's state, cloned: both moments and the step of each parameter."""
    parts = [part for child in optimizer.chained_optimizers for part in child.optimizer.sub_optimizers]
    return [
        torch.as_tensor(state[key]).clone()
        for part in parts
        for state in part.state.values()
        for key in ("exp_avg", "exp_avg_sq", "step")
        if key in state
    ]


def scale_masters(optimizer: Any) -> None:
    """Give the copies of 16-bit weights the values that the FP32 checkpoint holds."""
    done = set()
    for copy, weight in copies_and_weights(optimizer):
        if weight.dtype != torch.float32 and id(copy) not in done:
            copy.data.mul_(SCALED)
            done.add(id(copy))


def bring_in(way: str, rig: Rig, run: Run, stepper: Stepper) -> None:
    """Let the weights come in, as `way` says."""
    from megatron.bridge.training.checkpointing import sync_hybrid_optimizer_param_copies

    is_offloaded = run.cfg.optimizer.optimizer_cpu_offload
    if way == "running process":
        for _ in range(2):
            stepper.step()
        stepper.settle()
        before = moments(run.optimizer) if is_offloaded else []
        rig.load_weights(run.model)
        if is_offloaded:
            sync_hybrid_optimizer_param_copies(run.optimizer)
            after = moments(run.optimizer)
            assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "moments changed"
        else:
            run.optimizer.reload_model_params()
    elif way == "FP32 checkpoint" and not is_offloaded:
        rig.load_weights(run.model)
        run.optimizer.reload_model_params()
        scale_masters(run.optimizer)
    elif WAYS.get(way):
        load(run)


def run_way(
    way: str,
    rig: Rig,
    offload: dict[str, Any],
    replayed: list[list[torch.Tensor]] | None = None,
    *,
    only_last: bool = False,
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Trace]:
    """One run from random weights; the copies and weights it found before its first step, and what its steps did."""
    cfg = config(rig.directory, rig.model, offload=offload, checkpoint=WAYS.get(way, {}))
    chunks = rig.frozen if way == "frozen base" else rig.whole
    if way in ("in place", "frozen base"):
        rig.load_weights(chunks)
    else:
        fill_weights(chunks, seed=99)
    run = start(cfg, chunks)
    stepper = Stepper(run, replayed)
    bring_in(way, rig, run, stepper)
    pairs = copies_and_weights(run.optimizer)
    on_host = {id(copy): copy.detach().clone() for copy, _ in pairs if copy.device.type == "cpu"}  # before any wait
    found = [(on_host.get(id(copy), copy.detach()).cpu().clone(), weight.cpu().clone()) for copy, weight in pairs]
    return found, stepper.trace(only_last=only_last)


def run_cells(
    directory: Path, cells: list[Cell], ways: list[str], order: str | int | None = None
) -> dict[str, dict[str, str]]:
    """Every way of every cell of one model: "passed", or what differs.

    Args:
        directory: Of the model's weights.
        cells: All of one model.
        ways: In `WAYS`.
        order: Of adversarial streams; None: the ordinary accelerator. What cells are compared with always runs there.
    """
    rig = Rig(directory, cells[0].model)
    of_their_own = [way for way in ways if way in ("FP32 checkpoint", "running process", "frozen base")]
    plain: dict[str, dict[str, Trace]] = {}
    verdicts = {}
    for cell in cells:
        offload = _reference(cell)
        if repr(offload) not in plain:
            plain[repr(offload)] = {way: run_way(way, rig, offload)[1] for way in ("in place", *of_their_own)}
        with streams_in(order):
            verdicts[str(cell)] = _verdicts(rig, cell, ways, plain[repr(offload)], is_in_order=order is None)
    rig.close()
    return verdicts


def _reference(cell: Cell) -> dict[str, Any]:
    """The optimizer that computes a cell's bits: none is offloaded, unless the host rounds its state."""
    return offload_options(replace(cell, overlapped_step=False)) if cell.in_bf16 else {}


def _verdicts(rig: Rig, cell: Cell, ways: list[str], plain: dict[str, Trace], *, is_in_order: bool) -> dict[str, str]:
    """One cell against the run whose weights were in place when its optimizer was built, and those without offload."""
    from megatron.bridge.utils.device import is_simulated

    offload, tolerance = offload_options(cell), 0.0 if is_simulated() else ADAMS_APART
    in_place = run_way("in place", rig, offload)[1]
    verdicts = {"in place": traces_apart(in_place, plain["in place"], tolerance=tolerance)}
    for way in ways:
        if way in plain:  # on CUDA these have no bit-exact reference, and train on gradients of their own
            found, traced = run_way(way, rig, offload, plain[way].gradients if is_simulated() else None)
            apart = traces_apart(traced, plain[way], tolerance=tolerance)
        else:
            found, traced = run_way(way, rig, offload, in_place.gradients)
            apart = traces_apart(traced, in_place, tolerance=0.0)
        verdicts[way] = copies_apart(way, found) or apart
    if not differing(in_place.weights[0], in_place.weights[-1]):
        verdicts["in place"] = "no step moved a weight"
    if not is_in_order:  # whoever looks at weights waits for them
        unseen = run_way("in place", rig, offload, only_last=True)[1]
        last = in_place._replace(weights=in_place.weights[-1:])
        verdicts["in place, unseen"] = traces_apart(unseen, last, tolerance=0.0)
    return {way: verdict or "passed" for way, verdict in verdicts.items()}


def copies_apart(way: str, found: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Which copy is not its weight; empty where all are."""
    for copy, weight in found:
        exact = weight.float() * (SCALED if way == "FP32 checkpoint" and weight.dtype != torch.float32 else 1)
        if not torch.equal(copy.float(), exact):
            return f"a copy of shape {tuple(copy.shape)} is off by {float((copy.float() - exact).abs().max())}"
    return ""


def traces_apart(traced: Trace, reference: Trace, *, tolerance: float) -> str:
    """Where two runs differ by more than the tolerance; empty where they don't."""
    for step, (weights, wanted) in enumerate(zip(traced.weights, reference.weights, strict=True)):
        apart = {name: by for name, by in differing(weights, wanted).items() if by > tolerance}
        if apart:
            return f"after step {step}: {apart}"
    if not tolerance and traced.losses and traced.losses != reference.losses:
        return f"losses {traced.losses}, expected {reference.losses}"
    return ""


def load_mixed_chain(directory: Path, cell: Cell, offloaded: int) -> tuple[int, int, dict[str, float]]:
    """Load weights alone into a chain of two optimizers of which one is offloaded.

    Returns:
        The masters, how many of them don't equal their weight, and what a step with learning rate 0 moves.
    """
    rig = Rig(directory, cell.model)
    try:
        fill_weights(rig.whole, seed=99)
        checkpoint = WAYS["pretrained checkpoint"]
        cfg = config(directory, cell.model, offload=offload_options(cell), checkpoint=checkpoint)
        plain = start(config(directory, cell.model, offload={}, checkpoint={}), rig.whole)
        run = start(cfg, rig.whole)
        run.optimizer.chained_optimizers[1 - offloaded] = plain.optimizer.chained_optimizers[1 - offloaded]
        load(run)
        pairs = copies_and_weights(run.optimizer)
        stale = [copy for copy, weight in pairs if not torch.equal(copy.float().cpu(), weight.float().cpu())]
        before = weights_of(run.model)
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0
        Stepper(run, None).step()
        return len(pairs), len(stale), differing(before, weights_of(run.model))
    finally:
        rig.close()
