# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Build everything that a run needs, in order. Weights are loaded last, after the optimizer exists."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron.bridge.data.loaders import (
    build_datasets,
    context_of_run,
    evaluation_iterator,
    padding_of_run,
    training_iterator,
    unit_of,
)
from megatron.bridge.data.tokenizer import build_tokenizer, check_tokenizer_fits
from megatron.bridge.data.validation_sets import named_sets
from megatron.bridge.models.context_parallel import check_attention_can_share_rows
from megatron.bridge.models.packed_attention import check_samples_are_kept_apart
from megatron.bridge.models.trained_weights import check_trained_weights
from megatron.bridge.offload_engine.met import report_what_was_met
from megatron.bridge.training.callbacks import CallbackContext, CallbackManager
from megatron.bridge.training.checkpointing import (
    CheckpointLoadContext,
    DefaultCheckpointManager,
    check_hybrid_optimizer_param_copies,
    create_checkpoint_manager,
    init_checkpointing_context,
    plan_base_on_all_ranks,
    plan_on_all_ranks,
)
from megatron.bridge.training.config import ConfigContainer, DistributedDataParallelConfig
from megatron.bridge.training.config.update import count_steps_left, derive_from_data
from megatron.bridge.training.cpu_offload.param_copies import find_hybrid_optimizers
from megatron.bridge.training.initialize import initialize_megatron
from megatron.bridge.training.optim import setup_optimizer
from megatron.bridge.training.run_state.end_tokens import generation_config_to_save
from megatron.bridge.training.run_state.hub_revisions import record_hub_revisions
from megatron.bridge.training.run_state.load_plan import LoadPlan
from megatron.bridge.training.run_state.masters import check_masters_on_device
from megatron.bridge.training.run_state.offload_placement import settle_placement
from megatron.bridge.training.run_state.planned_load import load_base_weights
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.distributed import is_rank_0, raise_on_all_ranks, world_size
from megatron.bridge.utils.files import check_writable_directory

logger = logging.getLogger(__name__)


class SetupOutput(NamedTuple):
    """What `setup` built."""

    state: GlobalState
    model: list[Any]
    optimizer: Any
    scheduler: Any
    train_data_iterator: Any
    """Yields, for each step, the list of this rank's micro-batches."""
    valid_data_iterator: Any
    """Iterable: one pass over the validation set, each step a list of micro-batches; with several sets, a dict of such
    by name. None: no validation set."""
    test_data_iterator: Any
    checkpoint_manager: Any
    """A `CheckpointManager`: saves and loads the run."""

    pg_collection: ProcessGroupCollection

    @property
    def checkpointing_context(self) -> dict[str, Any]:
        """What the manager's saves and loads share, as `save_checkpoint` takes it; empty if it has none."""
        return getattr(self.checkpoint_manager, "checkpointing_context", {})


@dataclass(frozen=True)
class _Data:
    train: Any
    valid: Any
    test: Any
    padding: Any


def setup(
    state: GlobalState,
    train_valid_test_datasets_provider: Callable[..., Any] = build_datasets,
    get_embedding_ranks: Callable[..., Any] | None = None,
    get_position_embedding_ranks: Callable[..., Any] | None = None,
    restart_store: Any = None,
    callback_manager: CallbackManager | None = None,
    *,
    load_required: bool = False,
) -> SetupOutput:
    """Build process groups, data, model and optimizer, then load the checkpoint.

    Data and directories are checked first, because that is cheap and they are often wrong.

    Args:
        state: A new run, with a configuration that `runtime_config_update` has resolved and checked.
        train_valid_test_datasets_provider: Called with the dataset configuration and a `DatasetBuildContext`.
        get_embedding_ranks: Which ranks of a pipeline hold the embedding, for Core; None: the first and the last.
        get_position_embedding_ranks: Which hold learned positions, for Core; None: the first.
        restart_store: Refused: a restart within the process isn't supported.
        callback_manager: Its `on_data_init_start` is called.
        load_required: The run must start from a checkpoint, as `finetune` says.

    Returns:
        Everything built, in one tuple.

    Raises:
        ValueError, FileNotFoundError: The configuration, the data or a checkpoint is invalid. Raised on all ranks.
    """
    cfg = state.cfg
    pg_collection = initialize_megatron(
        cfg,
        get_embedding_ranks=get_embedding_ranks,
        get_position_embedding_ranks=get_position_embedding_ranks,
        restart_store=restart_store,
    )
    with raise_on_all_ranks("checking the attention"):
        check_attention_can_share_rows(cfg.model)
    state.derived = cfg.derive(world_size())
    if callback_manager is not None:
        callback_manager.fire("on_data_init_start", CallbackContext(state, []))
    _check_directories(cfg)
    _load_tokenizer(state)
    data = _build_data(state, train_valid_test_datasets_provider)
    with raise_on_all_ranks("counting the epochs"):
        state.derived = derive_from_data(cfg, train_samples=_size(data.train), unit=unit_of(data.train))
    # Too few samples or a wrong checkpoint should fail now, not after minutes of building. The iterator is made again
    # below, from the loaded train state.
    _train_iterator(state, data, pg_collection)
    manager = create_checkpoint_manager(cfg.checkpoint)
    if isinstance(manager, DefaultCheckpointManager):
        context = manager.checkpointing_context
    else:
        context = init_checkpointing_context(cfg)
    base_plan = plan_base_on_all_ranks(cfg)
    plan = plan_on_all_ranks(cfg, context, load_required=load_required)
    record_hub_revisions(cfg, base_plan, plan)
    with raise_on_all_ranks("reading where a text ends"):
        state.generation_config = generation_config_to_save(cfg, state.tokenizer, plan) if is_rank_0() else None

    model = _build_model(cfg, pg_collection, base_plan)
    _check_attention(state, data, model)
    if state.derived.train_iters > 0 and not state.derived.skip_train:
        check_trained_weights(model)
    choice = settle_placement(cfg, model, state.derived, plan)
    optimizer, scheduler = setup_optimizer(
        cfg.optimizer,
        cfg.scheduler,
        model,
        cfg.dist.use_gloo_process_groups,
        optimizer_config_override_provider=cfg.optimizer_config_override_provider,
        derived=state.derived,
    )
    if choice is not None:
        report_what_was_met([found.optimizer for found in find_hybrid_optimizers(optimizer)], choice)
    set_schedule_functions(model, optimizer, cfg)
    if plan is not None:
        load_and_check(manager, CheckpointLoadContext(state, model, optimizer, scheduler, plan=plan))

    _note_what_there_is_to_do(state, data)
    return SetupOutput(
        state,
        model,
        optimizer,
        scheduler,
        _train_iterator(state, data, pg_collection),
        _evaluation_steps(state, data.valid, data, pg_collection),
        _evaluation_steps(state, data.test, data, pg_collection),
        manager,
        pg_collection,
    )


def load_and_check(manager: Any, context: CheckpointLoadContext) -> None:
    """Load; where another manager than the default one does it, see that the optimizer's masters followed.

    Raises:
        RuntimeError: A master isn't the loaded weight, here or on another rank.
    """
    manager.load(context)
    if type(manager).load is not DefaultCheckpointManager.load:
        with raise_on_all_ranks(f"checking what {type(manager).__name__} loaded"):
            check_hybrid_optimizer_param_copies(context.optimizer, exact=False)
            check_masters_on_device(context.optimizer, context.model)


def _load_tokenizer(state: GlobalState) -> None:
    """Load the run's tokenizer; a model without a vocabulary size gets the tokenizer's."""
    cfg = state.cfg
    with raise_on_all_ranks("loading the tokenizer"):
        state.tokenizer = build_tokenizer(cfg.tokenizer)
        if cfg.model.vocab_size is None:
            cfg.model.vocab_size = state.tokenizer.vocab_size
        check_tokenizer_fits(state.tokenizer, cfg.model.vocab_size)


def _build_model(cfg: ConfigContainer, pg_collection: ProcessGroupCollection, base_plan: LoadPlan | None) -> list[Any]:
    """This rank's chunks, wrapped for data parallelism; with a plan of the weights under them, adapters in them."""
    return cfg.model.provide_distributed_model(
        ddp_config=_without_core_nan_check(cfg.ddp),
        data_parallel_random_init=cfg.rng.data_parallel_random_init,
        pg_collection=pg_collection,
        pre_wrap_hook=None if base_plan is None else partial(_add_adapters, cfg, base_plan),
    )


def _note_what_there_is_to_do(state: GlobalState, data: _Data) -> None:
    """Count the steps that are left, and say in the train state what the run trains and evaluates on."""
    train_state = state.train_state
    state.derived = derived = count_steps_left(
        state.cfg,
        state.derived,
        step=train_state.step,
        consumed_samples=train_state.consumed_train_samples,
        samples_per_epoch=_size(data.train),
    )
    train_state.do_train = data.train is not None and derived.train_iters > 0 and not derived.skip_train
    train_state.do_valid = data.valid is not None and derived.eval_iters != 0
    train_state.do_test = data.test is not None and derived.eval_iters != 0


def _without_core_nan_check(ddp: DistributedDataParallelConfig) -> DistributedDataParallelConfig:
    """A copy without Core's check for NaN gradients.

    Core's check ends one rank alone, doesn't name the step, and doesn't let FP16 overflow. `step_if_finite` checks all
    gradients in its place.
    """
    ddp = copy.copy(ddp)
    ddp.check_for_nan_in_grad = False
    return ddp


def _add_adapters(cfg: ConfigContainer, base_plan: LoadPlan, chunks: list[Any]) -> list[Any]:
    """Load the pretrained weights into bare chunks, freeze them, and add trainable adapters."""
    load_base_weights(cfg, base_plan, chunks)
    peft: Any = cfg.peft
    adapted = peft(chunks, training=True)
    params = [param for chunk in adapted for param in chunk.parameters()]
    trained = sum(param.numel() for param in params if param.requires_grad)
    logger.info("peft: %d of this rank's %d parameters are trained", trained, sum(param.numel() for param in params))
    return adapted


def maybe_log_and_save_config(cfg: ConfigContainer) -> None:
    """Log all options that differ from their defaults, and write the configuration to a file if asked to (rank 0)."""
    if not is_rank_0():
        return
    cfg.log_non_default_values()
    if cfg.logger.save_config_filepath is not None:
        cfg.to_yaml(cfg.logger.save_config_filepath)


def _check_directories(cfg: ConfigContainer) -> None:
    with raise_on_all_ranks("checking the output directories"):
        if is_rank_0():
            for option, path in (
                ("checkpoint.save", cfg.checkpoint.save),
                ("checkpoint.non_persistent_global_ckpt_dir", cfg.checkpoint.non_persistent_global_ckpt_dir),
                ("logger.tensorboard_dir", cfg.logger.tensorboard_dir),
            ):
                if path is not None:
                    check_writable_directory(path, option)


def _build_data(state: GlobalState, provider: Callable[..., Any]) -> _Data:
    cfg, derived = state.cfg, state.derived
    context = context_of_run(cfg, derived, state.tokenizer)
    train, valid, test = provider(cfg.dataset, context)
    with raise_on_all_ranks("naming the validation sets"):
        sets = named_sets(valid, context)
    held_out = {"validation": valid} if sets is None else {f"validation ({name})": each for name, each in sets.items()}
    for name, dataset in {"training": train, **held_out, "test": test}.items():
        if dataset is not None:
            state.data_report[f"{name} data"] = _report_on(dataset)
    padding = padding_of_run(cfg, state.tokenizer)
    return _Data(train, valid if sets is None else sets, test, padding)


def _size(dataset: Any) -> int | None:
    return None if dataset is None else len(dataset)


def _report_on(dataset: Any) -> str:
    """A dataset's report for the log; for a packed one, that of its rows and that of the samples in them."""
    reports = [getattr(part, "report", None) for part in (dataset, getattr(dataset, "samples", None))]
    return "; ".join(str(report) for report in reports if report is not None) or f"{len(dataset)} samples"


def _check_attention(state: GlobalState, data: _Data, model: list[Any]) -> None:
    held_out = data.valid.values() if isinstance(data.valid, dict) else (data.valid,)
    if any(getattr(dataset, "is_packed", False) for dataset in (data.train, *held_out, data.test)):
        rows = max(state.derived.micro_batch_size, state.derived.eval_micro_batch_size)
        with raise_on_all_ranks("checking that packed samples are kept apart"):
            check_samples_are_kept_apart(model, micro_batch_size=rows)


def _train_iterator(state: GlobalState, data: _Data, pg_collection: ProcessGroupCollection) -> Any:
    """This rank's micro-batches of each step, from the train state's consumed samples on; None without training."""
    ranks = _data_parallel_ranks(pg_collection)
    return training_iterator(data.train, state.cfg, state.derived, state.train_state, padding=data.padding, **ranks)


def _evaluation_steps(state: GlobalState, dataset: Any, data: _Data, pg_collection: ProcessGroupCollection) -> Any:
    # Core's interleaved schedule takes micro-batches in groups of the pipeline size, and refuses a remainder of 1.
    at_once = pg_collection.pp.size() if state.cfg.model.virtual_pipeline_model_parallel_size else 1
    ranks = _data_parallel_ranks(pg_collection)
    return evaluation_iterator(dataset, state.derived, padding=data.padding, micro_batches_at_once=at_once, **ranks)


def _data_parallel_ranks(pg_collection: ProcessGroupCollection) -> dict[str, int]:
    return {"data_parallel_rank": pg_collection.dp.rank(), "data_parallel_size": pg_collection.dp.size()}


def set_schedule_functions(model: list[Any], optimizer: Any, cfg: ConfigContainer) -> None:
    """Set the functions that Core's schedules call around the micro-batches of a step: loss scale, gradient sync."""
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = partial(finalize_model_grads)
    if isinstance(model[0], DistributedDataParallel) and cfg.ddp.overlap_grad_reduce:
        config.no_sync_func = _one_or_list([chunk.no_sync for chunk in model])
        if cfg.ddp.align_param_gather or len(model) > 1:
            config.grad_sync_func = _one_or_list([chunk.start_grad_sync for chunk in model])
    if cfg.ddp.overlap_param_gather and cfg.ddp.align_param_gather:
        config.param_sync_func = _one_or_list([chunk.start_param_sync for chunk in model])


def _one_or_list(functions: list[Callable]) -> Callable | list[Callable]:
    return functions[0] if len(functions) == 1 else functions
