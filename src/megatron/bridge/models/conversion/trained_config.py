# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The `config.json` of a trained model, with the values that the run has changed."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.families import architecture_of, build_provider, family_of
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.rope import yarn_attention_factor

logger = logging.getLogger(__name__)

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SCALING = tuple(f"rope_scaling_{name}" for name in _LLAMA3)
_YARN = (
    "yarn_rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_mscale",
    "yarn_mscale_all_dim",
    "yarn_correction_range_round_to_int",
)
_LATENT_YARN = (
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
"""Core's names in latent attention."""
_BY_LENGTH = {
    "dynamic": ("dynamic_rope_factor", "dynamic_rope_max_position_embeddings"),
    "longrope": (
        "longrope_short_factor",
        "longrope_long_factor",
        "longrope_original_max_position_embeddings",
        "longrope_attention_factor",
    ),
}
"""By `position_embedding_type`."""
_ROTARY = (
    "rotary_base",
    "rotary_percent",
    "position_embedding_type",
    "rope_scaling",
    *_SCALING,
    *_YARN,
    *(name for names in _BY_LENGTH.values() for name in names),
    "rope_type",
    *_LATENT_YARN,
    "seq_len_interpolation_factor",
)

COMPUTED_WITH = (
    *_ROTARY,
    "rotary_base_local",
    "latent_layernorm_epsilon",
    "rotary_interleaved",
    "no_rope_freq",
    "window_size",
    "window_attn_skip_freq",
    "softmax_scale",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "llama_4_scaling_beta",
    "final_logit_softcapping",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "gated_linear_unit",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "softmax_type",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_group_best",
    "moe_router_enable_expert_bias",
)
"""The fields, beside sizes, that the logits of a model depend on."""


def changed_in_training(hf_config: Mapping[str, Any], trained: GPTModelProvider) -> dict[str, tuple[Any, Any]]:
    """The fields that the logits depend on and that differ between a trained model and a Hugging Face configuration.

    Args:
        hf_config: Content of `config.json`.
        trained: The model's configuration.

    Returns:
        By name: the value in the file, and the value in training.
    """
    written = build_provider(hf_config)
    names = [name for name in COMPUTED_WITH if hasattr(trained, name)]
    if not (written.rope_scaling or getattr(trained, "rope_scaling", False)):
        names = [name for name in names if name not in _SCALING]
    kinds = (written.position_embedding_type, getattr(trained, "position_embedding_type", None))
    for kind, of_kind in {"yarn": _YARN, **_BY_LENGTH}.items():
        names = [name for name in names if kind in kinds or name not in of_kind]
    if "yarn" not in (getattr(written, "rope_type", None), getattr(trained, "rope_type", None)):
        names = [name for name in names if name not in _LATENT_YARN]
    pairs = {name: (_comparable(written, name), _comparable(trained, name)) for name in names}
    return {name: (before, after) for name, (before, after) in pairs.items() if before != after}


def config_as_trained(hf_config: Mapping[str, Any], trained: GPTModelProvider) -> dict[str, Any]:
    """A Hugging Face configuration with the values that a model was trained with.

    Args:
        hf_config: Content of the `config.json` of the model that it came from.
        trained: The model's configuration.

    Raises:
        ValueError: transformers has no key for a value, so that the exported model would be another.
    """
    differing = changed_in_training(hf_config, trained)
    if not differing:
        return dict(hf_config)
    changed = copy.deepcopy(dict(hf_config))
    if differing.keys() & set(_ROTARY):
        _set_rotary(changed, trained)
    if "layernorm_epsilon" in differing:
        changed["rms_norm_eps"] = trained.layernorm_epsilon
    if "moe_router_topk" in differing:
        key = "top_k_experts" if "top_k_experts" in changed else "num_experts_per_tok"  # Gemma 4's name, the others'
        changed[key] = trained.moe_router_topk
    if "moe_router_pre_softmax" in differing:
        changed["norm_topk_prob"] = not trained.moe_router_pre_softmax
    if "moe_router_topk_scaling_factor" in differing:
        changed["routed_scaling_factor"] = trained.moe_router_topk_scaling_factor
    if "window_size" in differing:
        changed["sliding_window"] = None if trained.window_size is None else trained.window_size[0] + 1
    write_own_keys = family_of(hf_config).write_own_keys
    if write_own_keys is not None:
        write_own_keys(changed, trained)
    _check_reads_back(changed, trained)
    for name, (before, after) in differing.items():
        logger.warning("config.json: model.%s is written as trained with, %r in place of %r", name, after, before)
    return changed


def check_base_is_as_trained(hf_config: Mapping[str, Any], trained: GPTModelProvider, name: str) -> None:
    """Refuse adapters of a model that was changed in training: peft puts them beside the model as its file says.

    Args:
        hf_config: Content of the model's `config.json`.
        trained: The configuration that the adapters were trained with.
        name: What the user called the model.

    Raises:
        ValueError: A field that logits depend on was another.
    """
    for field, (before, after) in changed_in_training(hf_config, trained).items():
        raise ValueError(
            f"the adapters were trained with model.{field}={after!r}, and the config.json of {name} says {before!r}: "
            "peft would put them beside another model; export the whole model, adapters merged (export)"
        )


def _set_rotary(config: dict[str, Any], trained: GPTModelProvider) -> None:
    """Write the rotary settings in the form that the file has: `rope_parameters`, or the keys before transformers 5."""
    if trained.rope_scaling:
        scaling = {"rope_type": "llama3", **{name: getattr(trained, f"rope_scaling_{name}") for name in _LLAMA3}}
    elif trained.position_embedding_type == "yarn":
        scaling = _yarn_parameters(trained)
    elif trained.position_embedding_type == "dynamic":
        scaling = {"rope_type": "dynamic", "factor": trained.dynamic_rope_factor}
        config["max_position_embeddings"] = trained.dynamic_rope_max_position_embeddings
    elif trained.position_embedding_type == "longrope":
        scaling = _longrope_parameters(trained)
        if "original_max_position_embeddings" in config:  # which goes before the other
            config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    elif getattr(trained, "rope_type", None) == "yarn":
        scaling = _latent_yarn_parameters(trained)
    elif trained.seq_len_interpolation_factor is not None:
        scaling = {"rope_type": "linear", "factor": trained.seq_len_interpolation_factor}
    else:
        scaling = {"rope_type": "default"}
    part = {} if trained.rotary_percent == 1 else {"partial_rotary_factor": trained.rotary_percent}
    if "rope_parameters" in config:
        for name in ("rope_theta", "rope_scaling"):
            config.pop(name, None)
        config.pop("partial_rotary_factor", None)
        config["rope_parameters"] = {"rope_theta": trained.rotary_base, **part, **scaling}
        return
    config |= {"rope_theta": trained.rotary_base, **part}
    config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling


def _longrope_parameters(trained: GPTModelProvider) -> dict[str, Any]:
    """LongRoPE's settings as transformers names them."""
    names = (name.removeprefix("longrope_") for name in _BY_LENGTH["longrope"])
    return {"rope_type": "longrope", **{name: getattr(trained, f"longrope_{name}") for name in names}}


def _yarn_parameters(trained: GPTModelProvider) -> dict[str, Any]:
    """YaRN's settings as transformers names them."""
    factor, mscale, all_dim = trained.yarn_rotary_scaling_factor, trained.yarn_mscale, trained.yarn_mscale_all_dim
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained.yarn_original_max_position_embeddings,
        "beta_fast": trained.yarn_beta_fast,
        "beta_slow": trained.yarn_beta_slow,
        "truncate": trained.yarn_correction_range_round_to_int,
    }
    if mscale and all_dim:
        parameters |= {"mscale": mscale, "mscale_all_dim": all_dim}
    elif mscale is not None and all_dim is not None:
        parameters["attention_factor"] = yarn_attention_factor(factor, mscale, all_dim)
    return parameters


def _latent_yarn_parameters(trained: Any) -> dict[str, Any]:
    """YaRN's settings of latent attention as transformers names them."""
    factor, mscale, all_dim = trained.rotary_scaling_factor, trained.mscale, trained.mscale_all_dim
    names = ("original_max_position_embeddings", "beta_fast", "beta_slow")
    return {
        "rope_type": "yarn",
        "factor": factor,
        **{name: getattr(trained, name) for name in names},
        "truncate": trained.yarn_correction_range_round_to_int,
        "mscale_all_dim": all_dim,
        **({"mscale": mscale} if all_dim else {"attention_factor": yarn_attention_factor(factor, mscale, all_dim)}),
    }


def _check_reads_back(config: Mapping[str, Any], trained: GPTModelProvider) -> None:
    try:
        remaining = changed_in_training(config, trained)
    except ValueError as error:
        raise ValueError(f"the model was trained with what can't be written to an export ({error})") from error
    for name, (before, after) in remaining.items():
        raise ValueError(
            f"the model was trained with model.{name}={after!r}, which the config.json of a {architecture_of(config)} "
            f"can't say (it is {before!r} there): transformers would compute another model; take the weights alone "
            "with AutoBridge.export_hf_weights, or train without it"
        )


def _comparable(provider: GPTModelProvider, name: str) -> Any:
    value = getattr(provider, name)
    if (
        name in ("yarn_mscale", "mscale") and value is not None
    ):  # from an attention_factor, and so to the last digit only
        return round(value, 9)
    return tuple(value) if isinstance(value, list) else value
