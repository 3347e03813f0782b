# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""How costs grow: with 4 and 16 times the parameters, 2 and 4 ranks, 100 and 1000 times the samples.

    python -m benchmarks.scale                                   # two minutes; the picture goes to docs/images
    python -m benchmarks.scale --plot build/scale.png

A figure is an exponent: the slope between two sizes where both axes are logarithmic. It is 1 where twice the size takes
twice the time. The limit allows 0.1 more, for what caches and timing add to a linear cost. Of several repeats the
fastest counts, because other work on the machine only adds time.

- Parameters: a Llama of 2, 8 and 32 layers, in one process, with all of its optimizer offloaded.
- Ranks: 8 layers over 1, 2 and 4 data-parallel ranks; the slowest rank's time counts. All ranks together save and load
  the same bytes each time. On a machine with fewer cores than ranks, they share the cores.
- Samples: 16 tokens each, read from the cache that a first run made.
"""

import argparse
import logging
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks.figures import Figure, interleaved, run
from benchmarks.hf_weights import LLAMA
from megatron.bridge.data.cache import cache_file, read_cache, write_cache
from megatron.bridge.data.packing import PackedDataset
from megatron.bridge.data.sampler import epoch_order
from megatron.bridge.data.sft import ARRAYS, DataReport, SFTDataset
from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.recipes.smollm2 import smollm2_135m_sft_config
from megatron.bridge.training import checkpointing
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.initialize import initialize_megatron
from megatron.bridge.training.optim import setup_optimizer
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils import device, distributed

LAYERS, RANKS, SAMPLES = (2, 8, 32), (1, 2, 4), (1_000, 100_000, 1_000_000)
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
TOKENS_PER_SAMPLE = 16

Curves = dict[str, dict[int, float]]
"""Cost -> size -> seconds, the fastest repeat's."""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("docs/images/scale.png"))
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Take all times, plot them, and return the exponents."""
    alone = _jobs(1, LAYERS, arguments.repeats)
    by_ranks: Curves = {cost: {1: alone[cost][LAYERS[1]]} for cost in ("sync", "save", "load")}
    for ranks in RANKS[1:]:
        together = _jobs(ranks, LAYERS[1:2], arguments.repeats)
        for cost, times in by_ranks.items():
            times[ranks] = together[cost][LAYERS[1]]
    parameters = {layers: _num_parameters(layers) for layers in LAYERS}
    curves = {
        "parameters": {
            cost: {parameters[layers]: taken for layers, taken in times.items()} for cost, times in alone.items()
        },
        "ranks": by_ranks,
        "samples": _samples(arguments.repeats),
    }
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    _plot(curves, arguments.plot)
    return [_figure(axis, cost, times) for axis, costs in curves.items() for cost, times in costs.items()]


def _figure(axis: str, cost: str, times: dict[int, float]) -> Figure:
    sizes = sorted(times)
    slopes = [
        math.log(times[more] / times[less]) / math.log(more / less)
        for less, more in zip(sizes, sizes[1:], strict=False)
    ]
    told = ", ".join(f"{size:.3g}: {1e3 * times[size]:.3g} ms" for size in sizes)
    return Figure(
        f"scale: {cost} over {axis}",
        "linear growth",
        tuple(slopes),
        at_most=1.1,
        unit="(exponent)",
        fails_above=1.25,
        note=told,
    )


def _num_parameters(layers: int) -> int:
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    heads, groups = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    attention = 2 * width * width + 2 * width * width * groups // heads
    return layers * (attention + 3 * width * inner + 2 * width) + width * (SHAPE["vocab_size"] + 1)


def _jobs(ranks: int, layers: tuple[int, ...], repeats: int) -> Curves:
    """Costs of models of some depths, each rank a process: the slowest rank's."""
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        job = (ranks, layers, repeats, directory, found)
        processes = [context.Process(target=_job, args=(rank, *job)) for rank in range(ranks)]
        for process in processes:
            process.start()
        results = []
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError("a rank failed; its traceback is above")
        results = [found.get() for _ in processes]
    return {
        cost: {depth: max(result[depth][cost] for result in results) for depth in layers}
        for cost in results[0][layers[0]]
    }


def _job(rank: int, ranks: int, layers: tuple[int, ...], repeats: int, directory: str, found: Any) -> None:
    logging.disable(logging.INFO)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    backend = device.enter_device().backend
    dist.init_process_group(backend, init_method=f"file://{directory}/ranks", rank=rank, world_size=ranks)
    taken = {}
    for depth in layers:
        seconds = interleaved(_costs(depth, Path(directory, str(depth))), repeats, settle=_settle)
        taken[depth] = {cost: min(each) for cost, each in seconds.items()}
        distributed.destroy_model_parallel()
    found.put(taken)


def _settle() -> None:
    os.sync()
    distributed.barrier()


def _costs(layers: int, directory: Path) -> dict[str, Callable[[], Any]]:
    """What is timed, on a model of some depth with its offloaded optimizer."""
    bridge = AutoBridge.from_hf_config({**LLAMA, **SHAPE, "num_hidden_layers": layers})
    cfg = smollm2_135m_sft_config()
    cfg.model = bridge.to_megatron_provider(load_weights=False)
    cfg.model.seq_length = cfg.dataset.seq_length
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.vocab_size = "NullTokenizer", SHAPE["vocab_size"]
    cfg.dataset.dataset_root = str(directory)
    cfg.checkpoint.save = cfg.checkpoint.load = str(directory / "checkpoint")
    cfg.checkpoint.most_recent_k = 1
    cfg.logger.tensorboard_dir = None
    runtime_config_update(cfg)
    initialize_megatron(cfg)
    model = cfg.model.provide_distributed_model(ddp_config=cfg.ddp)
    optimizer, scheduler = setup_optimizer(cfg.optimizer, cfg.scheduler, model)
    state = GlobalState(cfg)
    bridge.save_hf_pretrained(model, directory / "hf", show_progress=False)

    def save() -> None:
        state.train_state.step += 1
        checkpointing.save_checkpoint(state, model, optimizer, scheduler)

    return {
        "import": lambda: bridge.load_hf_weights(model, directory / "hf", show_progress=False),
        "sync": lambda: checkpointing.sync_hybrid_optimizer_param_copies(optimizer),
        "optimizer step": optimizer.step,
        "save": save,
        "load": lambda: checkpointing.load_checkpoint(state, model, optimizer, scheduler),
    }


def _samples(repeats: int) -> Curves:
    """Opening the cache of a data set, packing it, and drawing an epoch's order."""
    curves: Curves = {"open": {}, "pack": {}, "draw an epoch": {}}
    for count in SAMPLES:
        with tempfile.TemporaryDirectory() as directory:
            path = cache_file(directory, "samples", {})
            lengths = np.random.RandomState(0).randint(2, 2 * TOKENS_PER_SAMPLE, count)
            ids = np.zeros(lengths.sum(), dtype=np.int32)
            arrays = {"ids": ids, "learned": ids == 0, "starts": np.concatenate([[0], np.cumsum(lengths)])}
            report = DataReport(str(path), count, len(ids) - count, len(ids) - count, 0, 0, 2 * TOKENS_PER_SAMPLE)
            write_cache(path, arrays, recipe={}, report=vars(report))
            samples = SFTDataset(arrays, report)

            def read(path: Path = path, report: DataReport = report) -> SFTDataset:
                return SFTDataset(read_cache(path, ARRAYS, recipe={})[0], report)

            def draw(count: int = count) -> np.ndarray:
                epoch_order.cache_clear()
                return epoch_order(count, seed=1, epoch=0)

            rows = {
                "open": read,
                "pack": lambda samples=samples: PackedDataset(samples, size=256, seed=1),
                "draw an epoch": draw,
            }
            for cost, taken in interleaved(rows, repeats).items():
                curves[cost][count] = min(taken)
    return curves


def _plot(curves: dict[str, Curves], path: Path) -> None:
    """One panel an axis, both scales logarithmic, with a line of slope 1 to compare with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(9, 3.6), constrained_layout=True)
    for panel, (axis, costs) in zip(panels, curves.items(), strict=True):
        for cost, times in costs.items():
            panel.plot(list(times), list(times.values()), marker="o", markersize=3, linewidth=1.2, label=cost)
        sizes = sorted(next(iter(costs.values())))
        middle = math.exp(sum(math.log(t) for times in costs.values() for t in times.values()) / (3 * len(costs)))
        ends = [middle * size / sizes[1] for size in (sizes[0], sizes[-1])]
        panel.plot((sizes[0], sizes[-1]), ends, color="gray", linestyle=":", linewidth=1, label="linear")
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(sizes, [f"{size / 1e6:.3g}M" if size >= 1e6 else f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.grid(color="0.9")
        panel.legend(fontsize=7, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    panels[0].set_ylabel("seconds")
    panels[1].set_xlabel("ranks (same bytes in all)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(measure, build_parser())
