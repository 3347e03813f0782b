# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A recipe, a YAML file and overrides on the command line."""

import argparse

from megatron.bridge.recipes import llama32_1b_sft_config
from megatron.bridge.training.config import ConfigContainer, FinetuningDatasetConfig
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file")
    parser.add_argument("--pretrained-checkpoint", required=True)
    parser.add_argument("--dataset-root", required=True)
    arguments, overrides = parser.parse_known_args()

    config: ConfigContainer = llama32_1b_sft_config()
    config.checkpoint.pretrained_checkpoint = arguments.pretrained_checkpoint
    config.dataset = FinetuningDatasetConfig(dataset_root=arguments.dataset_root, seq_length=32, do_test=False)
    config = process_config_with_overrides(config, config_filepath=arguments.config_file, cli_overrides=overrides)
    finetune(config=config, forward_step_func=forward_step)


if __name__ == "__main__":
    main()
