# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Build a configuration from command-line options: a recipe, a Hugging Face directory, options, overrides."""

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.recipes import all_recipes, find_recipe
from megatron.bridge.recipes.hub_models import is_model_name, size_for
from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES, parallel_sizes, ranks_of_one_copy, row_divisor

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

MODES = {
    "pretrain": "pretrain",
    "sft": "sft",
    "peft": "peft",
    "finetune": "sft",  # Megatron Bridge 0.3's name
    "lora": "peft",
    "dora": "peft",
    "canonical_lora": "peft",
}
"""What `--mode` may say, and the mode of recipes that it means."""

PEFT_SCHEMES = ("lora", "dora", "canonical_lora")

_KEPT_WITH_A_DIRECTORY = (
    "seq_length",
    "calculate_per_token_loss",
    *(PARALLEL_SIZES[short].field for short in ("TP", "PP", "VP", "CP", "EP", "ETP")),
    "sequence_parallel",
    "cp_comm_type",
    "hierarchical_context_parallel_sizes",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
)
"""Fields of the model that say how it is trained, not what it is."""


@dataclass(frozen=True, kw_only=True)
class RecipeRequest:
    """What is asked for."""

    recipe: str
    """A recipe's name; with `mode` its first part will do, or the name on the hub of the model that it is for, which is
    `hf_path` too; or `module:function` of your own."""
    mode: str | None = None
    """One of `MODES`. None: as the recipe's name says."""
    peft_scheme: str | None = None
    """One of `PEFT_SCHEMES`. None: as the mode says, or LoRA."""
    hf_path: str | None = None
    """Hugging Face directory or hub name: its sizes, weights and tokenizer are taken. None: the recipe's sizes."""
    seq_length: int | None = None
    """Longest sample in tokens. None: the recipe's."""
    packed_sequence: bool = False
    """Whether to pack several samples into rows of `seq_length`."""
    deterministic: bool = False
    """Whether kernels and collectives add in one order, so that a repeated run gives the same bits."""
    config_file: str | None = None
    """YAML with options to set. None: no file."""
    overrides: Sequence[str] = ()
    """`train.train_iters=50` and the like; they have the last word."""

    def resolve(self) -> tuple[str, str]:
        """The recipe's full name, and its mode: "pretrain", "sft" or "peft".

        Raises:
            ValueError: There is none such, or its name and the mode contradict each other.
        """
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"--mode {self.mode!r}: expected one of {', '.join(MODES)}")
        asked = MODES[self.mode] if self.mode else None
        name = size_for(self.recipe) if is_model_name(self.recipe) else self.recipe
        if asked and f"{name}_{asked}_config" in all_recipes():
            name = f"{name}_{asked}_config"
        found = next((mode for mode in ("pretrain", "sft", "peft") if name.endswith(f"_{mode}_config")), None)
        is_finetune_of_adapters = self.mode == "finetune" and found == "peft"
        if found and asked and found != asked and not is_finetune_of_adapters:
            right = name.removesuffix(f"_{found}_config") + f"_{asked}_config"
            raise ValueError(f"--mode {self.mode} with recipe {name}: expected --mode {found}, or --recipe {right}")
        built = found or asked
        if built is None:
            find_recipe(name)
            raise ValueError(f"recipe {name!r} doesn't say what it does: add --mode pretrain, sft or peft")
        return name, built

    def build(self) -> "ConfigContainer":
        """The configuration that was asked for.

        Raises:
            ValueError, FileNotFoundError: Something asked for isn't there or can't work.
        """
        from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

        name, mode = self.resolve()
        recipe = find_recipe(name)
        scheme = self.peft_scheme or (self.mode if self.mode in PEFT_SCHEMES else None)
        if scheme and mode != "peft":
            raise ValueError(
                f"--peft-scheme {scheme} with recipe {name}, which trains all weights: use its peft recipe"
            )
        takes_scheme = "peft_scheme" in inspect.signature(recipe).parameters
        if scheme and not takes_scheme:
            raise ValueError(f"--peft-scheme {scheme}: recipe {name} takes no peft_scheme; set peft in it")
        cfg = recipe(peft_scheme=scheme) if scheme else recipe()
        hf_path = self.recipe if self.hf_path is None and is_model_name(self.recipe) else self.hf_path
        if hf_path is not None:
            use_hf_directory(cfg, hf_path)
        if self.seq_length is not None:
            cfg.model.seq_length = cfg.dataset.seq_length = self.seq_length
        if self.packed_sequence:
            if not hasattr(cfg.dataset, "enable_offline_packing"):
                raise ValueError(f"--packed-sequence: recipe {name} trains on whole rows already; leave it out")
            cfg.dataset.enable_offline_packing = True
        if self.deterministic:
            from megatron.bridge.recipes.utils.determinism_utils import apply_determinism_overrides

            apply_determinism_overrides(cfg)
        cfg = process_config_with_overrides(cfg, self.config_file, list(self.overrides))
        if self.packed_sequence:
            pad_packed_samples(cfg)
        return cfg


def pad_packed_samples(cfg: "ConfigContainer") -> None:
    """Where ranks are to share rows, pad each packed sample so that they can, unless the configuration says how."""
    dataset: Any = cfg.dataset
    specs = None if dataset.packed_sequence_specs is not None else dataset.packing
    if cfg.model.context_parallel_size > 1 and specs is not None and specs.pad_seq_to_mult == 1:
        dataset.offline_packing_specs = dataclasses.replace(specs, pad_seq_to_mult=row_divisor(cfg.model))


def use_hf_directory(cfg: "ConfigContainer", hf_path: str) -> None:
    """Take a model's sizes, weights and tokenizer from a Hugging Face directory; how it is trained stays.

    Args:
        cfg: Any configuration; it is changed.
        hf_path: The directory, or a hub name, of which only the configuration is fetched here.

    Raises:
        FileNotFoundError: No such model.
        ValueError: Its architecture or configuration can't be expressed.
    """
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(hf_path)
    provider = bridge.to_megatron_provider(load_weights=False)
    known = {field.name for field in dataclasses.fields(provider)}
    for name in _KEPT_WITH_A_DIRECTORY:
        if name in known:
            setattr(provider, name, getattr(cfg.model, name))
    cfg.model = provider
    if cfg.tokenizer.tokenizer_type == "HuggingFaceTokenizer":  # else it is for data that is numbers already
        named = str(bridge.directory) if bridge.download is None else bridge.name
        cfg.checkpoint.pretrained_checkpoint = cfg.tokenizer.tokenizer_model = named
    else:
        cfg.tokenizer.vocab_size = provider.vocab_size


def smallest_world_size(cfg: "ConfigContainer") -> int:
    """The fewest ranks that one copy of a configuration's model takes."""
    return ranks_of_one_copy(parallel_sizes(cfg.model))
