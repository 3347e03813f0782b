# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rules on how ranks share the model: tensor, pipeline, sequence, context and expert parallelism, and recomputation."""

import math

from megatron.bridge.training.config.derived import data_parallel_size, global_batch_size
from megatron.bridge.training.config.sections import RunSections
from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES, expert_factors, in_words, parallel_sizes


def check_parallel_sizes_are_positive(cfg: RunSections, world_size: int) -> None:
    """Each parallel size counts something."""
    for size in PARALLEL_SIZES.values():
        value = getattr(cfg.model, size.field)
        if value is not None and value < 1:
            raise ValueError(f"model.{size.field} is {value}: it counts {size.meaning}; set 1 or more")


def check_parallel_sizes_divide_world(cfg: RunSections, world_size: int) -> None:
    """Tensor times pipeline times context parallel size divides the number of ranks."""
    data_parallel_size(cfg, world_size)


def check_model_has_a_size(cfg: RunSections, world_size: int) -> None:
    """Layers, heads and width are set; Core's defaults are 0."""
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if not getattr(cfg.model, name):
            raise ValueError(
                f"model.{name} is not set: set it, or take the model from AutoBridge.from_hf_pretrained(...)"
                ".to_megatron_provider()"
            )


def check_tensor_parallel_divides_heads(cfg: RunSections, world_size: int) -> None:
    """Each tensor parallel rank gets whole attention heads."""
    heads, size = cfg.model.num_attention_heads, cfg.model.tensor_model_parallel_size
    if heads % size:
        possible = [number for number in range(1, heads + 1) if heads % number == 0]
        raise ValueError(
            f"model.tensor_model_parallel_size={size} doesn't divide model.num_attention_heads={heads}: "
            f"each rank needs whole heads; set model.tensor_model_parallel_size to one of {possible}"
        )


def check_query_groups_fit(cfg: RunSections, world_size: int) -> None:
    """Query groups divide the heads; tensor parallel size divides them or is a multiple of them."""
    groups, size = cfg.model.num_query_groups, cfg.model.tensor_model_parallel_size
    if groups is None:
        return
    if groups < 1 or cfg.model.num_attention_heads % groups:
        raise ValueError(
            f"model.num_query_groups={groups} doesn't divide model.num_attention_heads="
            f"{cfg.model.num_attention_heads}: each group serves equally many heads; set a divisor, or null for "
            f"one each"
        )
    if groups % size and size % groups:
        raise ValueError(
            f"model.tensor_model_parallel_size={size} and model.num_query_groups={groups}: "
            "one must divide the other; change model.tensor_model_parallel_size"
        )


def check_tensor_parallel_divides_ffn(cfg: RunSections, world_size: int) -> None:
    """Each tensor parallel rank gets an equal part of the MLP."""
    width, size = cfg.model.ffn_hidden_size, cfg.model.tensor_model_parallel_size
    if width is not None and width % size:
        raise ValueError(
            f"model.tensor_model_parallel_size={size} doesn't divide model.ffn_hidden_size={width}: "
            "each rank needs an equal part; change model.tensor_model_parallel_size"
        )


def check_tensor_parallel_divides_vocabulary(cfg: RunSections, world_size: int) -> None:
    """Each tensor parallel rank gets equally many rows of the embedding, padding included."""
    model, size = cfg.model, cfg.model.tensor_model_parallel_size
    if model.vocab_size is None or model.should_pad_vocab or model.vocab_size % size == 0:
        return  # not known yet (the tokenizer says it later), or padded to fit
    raise ValueError(
        f"model.tensor_model_parallel_size={size} doesn't divide model.vocab_size={model.vocab_size}: "
        "each rank needs equally many rows; set model.should_pad_vocab=true"
    )


def _has_uneven_stages(cfg: RunSections) -> bool:
    """Whether the model says itself which layers go where; Core checks that."""
    model = cfg.model
    return bool(
        model.num_layers_in_first_pipeline_stage
        or model.num_layers_in_last_pipeline_stage
        or model.account_for_embedding_in_pipeline_split
        or model.account_for_loss_in_pipeline_split
        or model.pipeline_model_parallel_layout
    )


def check_pipeline_parallel_divides_layers(cfg: RunSections, world_size: int) -> None:
    """Each pipeline stage, and each virtual one, gets equally many layers, unless the model says otherwise."""
    model = cfg.model
    if _has_uneven_stages(cfg):
        return
    virtual = model.virtual_pipeline_model_parallel_size or 1
    stages = model.pipeline_model_parallel_size * virtual
    if model.num_layers % stages:
        raise ValueError(
            f"model.num_layers={model.num_layers} can't be shared by model.pipeline_model_parallel_size="
            f"{model.pipeline_model_parallel_size} x virtual_pipeline_model_parallel_size={virtual}: expected a "
            f"multiple "
            f"of {stages}; change the sizes, or set model.num_layers_in_first_pipeline_stage or "
            "num_layers_in_last_pipeline_stage"
        )


def check_virtual_pipeline_fits(cfg: RunSections, world_size: int) -> None:
    """Virtual stages need real ones, and micro-batches that fill them."""
    virtual, stages = cfg.model.virtual_pipeline_model_parallel_size, cfg.model.pipeline_model_parallel_size
    if virtual is None:
        return
    if stages < 2 and virtual > 1:
        raise ValueError(
            f"model.virtual_pipeline_model_parallel_size={virtual} with model.pipeline_model_parallel_size={stages}: "
            "virtual stages cut real ones; set it to null or raise model.pipeline_model_parallel_size"
        )
    microbatches = global_batch_size(cfg, world_size) // (
        cfg.train.required_micro_batch_size() * data_parallel_size(cfg, world_size)
    )
    if microbatches % stages:
        raise ValueError(
            f"{microbatches} micro-batches in a step with model.virtual_pipeline_model_parallel_size={virtual}: the "
            f"interleaved schedule wants a multiple of model.pipeline_model_parallel_size={stages}; change "
            "train.global_batch_size or train.micro_batch_size"
        )


def check_two_virtual_stages_keep_messages_apart(cfg: RunSections, world_size: int) -> None:
    """With two ranks in the pipeline, the next stage is the previous one too: a batch would mix up their messages.

    Core notices nothing and trains on activations and gradients of the wrong layers.
    """
    model = cfg.model
    if model.pipeline_model_parallel_size != 2 or (model.virtual_pipeline_model_parallel_size or 1) == 1:
        return
    if not model.overlap_p2p_comm or model.batch_p2p_comm:
        raise ValueError(
            f"model.virtual_pipeline_model_parallel_size={model.virtual_pipeline_model_parallel_size} with "
            f"model.pipeline_model_parallel_size=2, model.overlap_p2p_comm={str(model.overlap_p2p_comm).lower()} and "
            f"model.batch_p2p_comm={str(model.batch_p2p_comm).lower()}: two ranks would mix up what they send each "
            "other; set model.overlap_p2p_comm=true and model.batch_p2p_comm=false"
        )


def check_sequence_parallel_needs_tensor_parallel(cfg: RunSections, world_size: int) -> None:
    """Sequence parallelism shares the sequence among tensor parallel ranks."""
    model, size = cfg.model, cfg.model.tensor_model_parallel_size
    if not model.sequence_parallel:
        return
    if size < 2:
        raise ValueError(
            f"model.sequence_parallel=true with model.tensor_model_parallel_size={size}: it shares the sequence among "
            "tensor parallel ranks; set model.sequence_parallel=false or raise the size"
        )
    if model.seq_length % size:
        raise ValueError(
            f"model.seq_length={model.seq_length} with model.sequence_parallel=true: expected a multiple of "
            f"model.tensor_model_parallel_size={size}; change model.seq_length and dataset.seq_length"
        )


def check_experts_are_shared_evenly(cfg: RunSections, world_size: int) -> None:
    """Expert parallelism needs experts, equally many on each rank."""
    size, experts = cfg.model.expert_model_parallel_size, cfg.model.num_moe_experts
    if size == 1:
        return
    if experts is None or experts % size:
        raise ValueError(
            f"model.expert_model_parallel_size={size} with model.num_moe_experts={experts}: expected a number "
            f"of experts "
            "that it divides; set model.expert_model_parallel_size=1 or change it"
        )
    factors = expert_factors(parallel_sizes(cfg.model))
    if world_size % math.prod(factors.values()):
        raise ValueError(
            f"{world_size} ranks can't be shared by model.{in_words(factors)}: "
            "the product must divide the number of ranks; change one"
        )


def check_recomputation_is_complete(cfg: RunSections, world_size: int) -> None:
    """Full recomputation says how and of how many layers; selective recomputation says which modules."""
    model = cfg.model
    if model.recompute_granularity == "full":
        for name in ("recompute_method", "recompute_num_layers"):
            if getattr(model, name) is None:
                raise ValueError(
                    f"model.recompute_granularity=full without model.{name}: "
                    "set model.recompute_method=uniform and model.recompute_num_layers=1"
                )
    elif model.recompute_granularity == "selective":
        for name in ("recompute_method", "recompute_num_layers"):
            if getattr(model, name) is not None:
                raise ValueError(
                    f"model.{name}={getattr(model, name)} with model.recompute_granularity=selective: it only "
                    f"counts for "
                    f"full; set model.{name}=null, or model.recompute_granularity=full"
                )
    if model.distribute_saved_activations and model.sequence_parallel:
        raise ValueError(
            "model.distribute_saved_activations=true with model.sequence_parallel=true: sequence parallelism "
            "shares them "
            "already; set model.distribute_saved_activations=false"
        )


def check_activation_offload_stands_alone(cfg: RunSections, world_size: int) -> None:
    """Core offloads activations of a model in one pipeline stage, without recomputation."""
    model = cfg.model
    if not model.cpu_offloading:
        return
    if model.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"model.cpu_offloading=true with model.pipeline_model_parallel_size={model.pipeline_model_parallel_size}: "
            "Core can't do both; set model.cpu_offloading=false (optimizer.optimizer_cpu_offload is another option)"
        )
    if model.recompute_granularity is not None:
        raise ValueError(
            f"model.cpu_offloading=true with model.recompute_granularity={model.recompute_granularity}: "
            f"activations are "
            "kept on the host or computed again, not both; set one of them to false or null"
        )


def check_tensor_parallel_overlap_can_run(cfg: RunSections, world_size: int) -> None:
    """Overlap of tensor parallel communication needs sequence parallelism."""
    if cfg.model.tp_comm_overlap and not cfg.model.sequence_parallel:
        raise ValueError(
            "model.tp_comm_overlap=true with model.sequence_parallel=false: Transformer Engine overlaps the "
            "communication "
            "of sequence parallelism; set model.sequence_parallel=true or model.tp_comm_overlap=false"
        )


PARALLEL_RULES = (
    check_model_has_a_size,
    check_parallel_sizes_are_positive,
    check_parallel_sizes_divide_world,
    check_tensor_parallel_divides_heads,
    check_query_groups_fit,
    check_tensor_parallel_divides_ffn,
    check_tensor_parallel_divides_vocabulary,
    check_pipeline_parallel_divides_layers,
    check_two_virtual_stages_keep_messages_apart,
    check_sequence_parallel_needs_tensor_parallel,
    check_experts_are_shared_evenly,
    check_recomputation_is_complete,
    check_activation_offload_stands_alone,
    check_tensor_parallel_overlap_can_run,
)
"""Rules that need nothing but the model and the number of ranks."""
