# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A recipe script that merges a YAML file and Hydra overrides itself, through OmegaConf."""

import argparse
import logging
import os
import sys
from pathlib import Path

import torch
from megatron.bridge.recipes.qwen.qwen3 import qwen3_600m_sft_config as sft_config
from omegaconf import OmegaConf

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.utils.omegaconf_utils import (
    apply_overrides,
    create_omegaconf_dict_config,
    parse_hydra_overrides,
)
from megatron.bridge.utils.common_utils import get_rank_safe

logger: logging.Logger = logging.getLogger(__name__)


def parse_cli_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config-file", type=str, default=None)
    parser.add_argument("--pretrained-checkpoint", type=str)
    parser.add_argument("--debug", action="store_true")
    return parser.parse_known_args()


def main() -> None:
    args, cli_overrides = parse_cli_args()
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.INFO, format="%(name)s: %(message)s")

    cfg: ConfigContainer = sft_config()
    cfg.checkpoint.pretrained_checkpoint = args.pretrained_checkpoint
    if get_rank_safe() == 0:
        cfg.print_yaml()

    merged_omega_conf, excluded_fields = create_omegaconf_dict_config(cfg)
    if args.config_file:
        if not os.path.exists(args.config_file):
            logger.error(f"Override YAML file not found: {args.config_file}")
            sys.exit(1)
        yaml_overrides_omega = OmegaConf.load(Path(args.config_file))
        merged_omega_conf = OmegaConf.merge(merged_omega_conf, yaml_overrides_omega)
    if cli_overrides:
        merged_omega_conf = parse_hydra_overrides(merged_omega_conf, cli_overrides)

    final_overrides_as_dict = OmegaConf.to_container(merged_omega_conf, resolve=True)
    apply_overrides(cfg, final_overrides_as_dict, excluded_fields)
    if get_rank_safe() == 0:
        cfg.print_yaml()

    finetune(config=cfg, forward_step_func=forward_step)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
