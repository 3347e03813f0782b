# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Datasets and the batches made of them.

A micro-batch is a dict of host tensors: `tokens`, `labels` (shifted), `position_ids` (int64) and `loss_mask`
(float32), each [B, S], and `attention_mask` None (causal). Packed rows have `cu_seqlens` too, [B, N + 1] int32: 0, the
end of each sample, and S where a row has fewer than N samples. S follows from the samples of the whole global batch,
so that all its micro-batches are alike on every rank, or from those of each micro-batch. Nothing here asks another
rank: ranks of one data-parallel rank make identical batches.
"""

import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from megatron.bridge.data.build import DatasetConfig, Datasets, build_datasets, context_of_run
from megatron.bridge.data.config import GPTSFTDatasetConfig
from megatron.bridge.data.padded_rows import MicroBatch, PaddedRows, Padding, pad_sample, stack_rows
from megatron.bridge.data.sampler import PADDING_ROW, BatchLayout, evaluation_batches, training_batches
from megatron.bridge.data.tokenizer import build_tokenizer
from megatron.bridge.data.validation_sets import named_sets
from megatron.bridge.utils.device import current_device, is_simulated
from megatron.bridge.utils.distributed import raise_on_all_ranks, world_size
from megatron.bridge.utils.parallel_sizes import row_divisor

__all__ = [
    "EvaluationSteps",
    "Padding",
    "build_datasets",
    "build_evaluation_steps",
    "build_iterator",
    "build_step_iterator",
    "context_of_run",
    "evaluation_iterator",
    "pad_sample",
    "padding_for",
    "padding_of_run",
    "setup_data_iterators",
    "training_iterator",
    "unit_of",
]


def padding_for(
    config: DatasetConfig, tokenizer: Any, *, seq_length: int, divisor: int = 1, per_micro_batch: bool = False
) -> Padding:
    """Returns the padding that `config` asks for.

    Args:
        config: The dataset's configuration.
        tokenizer: As made by `build_tokenizer`.
        seq_length: The model's sequence length.
        divisor: What each S must be a multiple of (sequence and context parallel sizes).
        per_micro_batch: See `Padding`.

    Raises:
        ValueError: `seq_length` is not a multiple of `divisor`.
    """
    if seq_length % divisor:
        raise ValueError(f"seq_length={seq_length} is not a multiple of {divisor}, the parallel sizes that share it")
    if not isinstance(config, GPTSFTDatasetConfig):
        return Padding(
            seq_length=seq_length,
            multiple_of=int(np.lcm(16, divisor)),
            per_micro_batch=per_micro_batch,
            pad_id=tokenizer.pad_id,
        )
    options = config.options
    return Padding(
        seq_length=seq_length,
        multiple_of=int(np.lcm(options.pad_seq_length_to_mult, divisor)),
        to_full_length=options.pad_to_max_length,
        per_micro_batch=per_micro_batch,
        pad_id=tokenizer.pad_id,
    )


def build_step_iterator(
    dataset: Any,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    seed: int,
    shuffle: bool,
    padding: Padding,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[MicroBatch]]:
    """Returns an endless iterator over training steps: this rank's micro-batches of each global batch.

    Args:
        dataset: Map-style; see `DatasetProvider` for its items.
        consumed_samples: Samples that all ranks together have trained on already.
        micro_batch_size: Rows of one micro-batch.
        global_batch_size: Rows of one step, over all data-parallel ranks.
        data_parallel_rank: This rank, within its data-parallel group.
        data_parallel_size: Size of that group.
        seed: Seed of the order.
        shuffle: Whether samples come in a new order each epoch.
        padding: How rows become one length.
        num_workers: Processes that read ahead; 0 reads in this process.
        pin_memory: Whether to put batches in page-locked memory, where there is a GPU.

    Raises:
        ValueError: The sizes don't divide, or there are fewer samples than one global batch takes.
    """
    if dataset is None:
        raise ValueError("there is no training data: build_datasets gave None for it")
    layout = BatchLayout(
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    batches = training_batches(
        len(dataset),
        layout,
        consumed_samples=consumed_samples,
        seed=seed,
        shuffle=shuffle,
        unit=unit_of(dataset),
        order=getattr(dataset, "training_order", None),
    )
    rows = PaddedRows(dataset, padding)
    steps = (rows.keys_of_step(batch, layout) for batch in batches)
    return _load_steps(rows, steps, num_workers=num_workers, pin_memory=pin_memory)


def unit_of(dataset: Any) -> str:
    """What messages call the items of a dataset."""
    return "packs" if getattr(dataset, "is_packed", False) else "samples"


def build_iterator(dataset: Any, **arguments: Any) -> Iterator[MicroBatch]:
    """Returns an endless iterator over this rank's micro-batches; arguments as for `build_step_iterator`."""
    return chain.from_iterable(build_step_iterator(dataset, **arguments))


class EvaluationSteps:
    """One pass over a dataset, each sample once over all data-parallel ranks; may be iterated again and again.

    Iterating yields this rank's micro-batches of each global batch as a list. Every rank gets lists of the same
    lengths; rows that only fill up the last batch have `loss_mask` 0.
    """

    def __init__(
        self,
        dataset: Any,
        layout: BatchLayout,
        *,
        padding: Padding,
        max_batches: int | None = None,
        micro_batches_at_once: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Plans the pass.

        Args:
            dataset: Map-style; see `DatasetProvider` for its items.
            layout: How batches are dealt to ranks.
            padding: How rows become one length.
            max_batches: Stop after this many global batches. None: cover all samples.
            micro_batches_at_once: See `evaluation_batches`.
            num_workers: Processes that read ahead; 0 reads in this process.
            pin_memory: Whether to put batches in page-locked memory, where there is a GPU.

        Raises:
            ValueError: The dataset is empty.
        """
        if len(dataset) == 0:
            raise ValueError("the evaluation data has no samples: add some or switch the evaluation off")
        self._rows = PaddedRows(dataset, padding)
        self._layout = layout
        self._batches = evaluation_batches(
            len(dataset), layout, max_batches=max_batches, micro_batches_at_once=micro_batches_at_once
        )
        self._loading: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}

    @property
    def num_samples(self) -> int:
        """Samples of one pass over all ranks, padding rows not counted."""
        return sum(int((batch != PADDING_ROW).sum()) for batch in self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        steps = [self._rows.keys_of_step(batch, self._layout) for batch in self._batches]
        return _load_steps(self._rows, steps, **self._loading)


def build_evaluation_steps(
    dataset: Any,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    **arguments: Any,
) -> EvaluationSteps:
    """Returns `EvaluationSteps` of `dataset`; sizes as for `build_step_iterator`, the rest as for the class."""
    layout = BatchLayout(
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    return EvaluationSteps(dataset, layout, **arguments)


def setup_data_iterators(
    cfg: Any,
    train_state: Any,
    model_length: int,
    train_valid_test_datasets_provider: Callable[..., Datasets] = build_datasets,
    dp_group: Any = None,
    *,
    tokenizer: Any = None,
) -> tuple[Any, Any, Any]:
    """The training, validation and test data of a run, as `setup` makes them. Call on all ranks.

    Args:
        cfg: The run's `ConfigContainer`, resolved by `runtime_config_update`.
        train_state: The run's `TrainState`: training continues after its consumed samples.
        model_length: This rank's chunks of the model: more than one with virtual pipeline stages.
        train_valid_test_datasets_provider: Called with the dataset configuration and a `DatasetBuildContext`.
        dp_group: The data-parallel group. None: this process alone.
        tokenizer: The run's. None: built from `cfg.tokenizer`.

    Returns:
        Each yields, for a step, the list of this rank's micro-batches. Training has no end; the others go once through
        the data and can be iterated again. None for data that isn't wanted. With several validation sets, a dict of
        such by name.

    Raises:
        FileNotFoundError, ValueError: The configuration or the data can't be used.
    """
    with raise_on_all_ranks("loading the tokenizer"):
        tokenizer = build_tokenizer(cfg.tokenizer) if tokenizer is None else tokenizer
    derived = cfg.derive(world_size())
    context = context_of_run(cfg, derived, tokenizer)
    train, valid, test = train_valid_test_datasets_provider(cfg.dataset, context)
    with raise_on_all_ranks("naming the validation sets"):
        sets = named_sets(valid, context)
    ranks = {
        "data_parallel_rank": 0 if dp_group is None else dp_group.rank(),
        "data_parallel_size": 1 if dp_group is None else dp_group.size(),
    }
    padding = padding_of_run(cfg, tokenizer)
    at_once = cfg.model.pipeline_model_parallel_size if model_length > 1 else 1
    held_out = [
        evaluation_iterator(each, derived, padding=padding, micro_batches_at_once=at_once, **ranks)
        for each in (valid if sets is None else sets, test)
    ]
    return training_iterator(train, cfg, derived, train_state, padding=padding, **ranks), held_out[0], held_out[1]


def padding_of_run(cfg: Any, tokenizer: Any) -> Padding:
    """How a run pads its rows; `cfg` is its `ConfigContainer`. ValueError: ranks can't share a row evenly."""
    return padding_for(
        cfg.dataset,
        tokenizer,
        seq_length=cfg.model.seq_length,
        divisor=row_divisor(cfg.model),
        per_micro_batch=cfg.model.pipeline_model_parallel_size == 1,
    )


def training_iterator(dataset: Any, cfg: Any, derived: Any, train_state: Any, *, padding: Padding, **ranks: int) -> Any:
    """This rank's micro-batches of each step, from the consumed samples on; None without training. Collective.

    Args:
        dataset: The training data, or None.
        cfg: The run's `ConfigContainer`.
        derived: Its `DerivedConfig`.
        train_state: The run's `TrainState`.
        padding: How rows become one length.
        ranks: `data_parallel_rank` and `data_parallel_size`.

    Raises:
        ValueError: There are fewer samples than one global batch takes.
    """
    if dataset is None or derived.skip_train:
        return None
    with raise_on_all_ranks("preparing the training data"):
        return build_step_iterator(
            dataset,
            consumed_samples=train_state.consumed_train_samples,
            micro_batch_size=derived.micro_batch_size,
            global_batch_size=derived.global_batch_size,
            seed=getattr(cfg.dataset, "seed", cfg.rng.seed),
            shuffle=cfg.dataset.is_shuffled,
            padding=padding,
            num_workers=cfg.dataset.num_workers,
            pin_memory=cfg.dataset.pin_memory,
            **ranks,
        )


def evaluation_iterator(
    dataset: Any, derived: Any, *, padding: Padding, micro_batches_at_once: int = 1, **ranks: int
) -> Any:
    """One pass over held-out data, of a dict of datasets a dict of such; None without it.

    Args:
        dataset: The data, a dict of datasets by name, or None.
        derived: The run's `DerivedConfig`.
        padding: How rows become one length.
        micro_batches_at_once: See `EvaluationSteps`.
        ranks: `data_parallel_rank` and `data_parallel_size`.
    """
    if dataset is None or derived.eval_iters == 0:
        return None
    options: dict[str, Any] = {"padding": padding, "micro_batches_at_once": micro_batches_at_once, **ranks}
    if isinstance(dataset, dict):
        return {name: evaluation_iterator(each, derived, **options) for name, each in dataset.items()}
    return build_evaluation_steps(
        dataset,
        micro_batch_size=derived.eval_micro_batch_size,
        global_batch_size=derived.eval_global_batch_size,
        max_batches=derived.eval_iters,
        **options,
    )


def _take_signals_as_the_run_does(_: int) -> None:
    """In a worker: ignore SIGTERM if the run catches it. By default torch ends the worker, and with it the run.

    torchrun and schedulers also send the signal to the workers, whose batch is needed for the last step before the
    save.
    """
    handler = signal.getsignal(signal.SIGTERM)  # forked: the run's
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)


def _load_steps(
    rows: PaddedRows, steps: Iterable[list[list[tuple[int, int]]]], *, num_workers: int, pin_memory: bool
) -> Iterator[list[MicroBatch]]:
    """Yields the micro-batches of each step; a step is a list of micro-batches' keys."""
    sizes: list[int] = []

    def micro_batch_keys() -> Iterator[list[tuple[int, int]]]:
        for step in steps:
            sizes.append(len(step))
            yield from step

    loader = DataLoader(
        rows,
        batch_sampler=micro_batch_keys(),
        collate_fn=stack_rows,
        num_workers=num_workers,
        pin_memory=pin_memory and not is_simulated() and current_device().type != "cpu",
        worker_init_fn=_take_signals_as_the_run_does,
        # Its own generator: without one, the loader draws from the run's random numbers.
        generator=torch.Generator(device="cpu").manual_seed(0),
    )
    loaded: list[MicroBatch] = []
    for micro_batch in loader:
        loaded.append(micro_batch)
        if len(loaded) == sizes[0]:
            yield loaded
            loaded = []
            sizes.pop(0)
