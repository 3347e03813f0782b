# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A training script that calls setup and the loop's parts itself."""

import sys

from common import finetuning_config
from megatron.core.utils import get_model_config

from megatron.bridge.training.checkpointing import save_checkpoint
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.eval import evaluate_and_print_results
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.initialize import destroy_global_state
from megatron.bridge.training.setup import setup
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.train import train
from megatron.bridge.utils.common_utils import print_rank_0

if __name__ == "__main__":
    hf_model, data, output = sys.argv[1:]
    cfg = finetuning_config(hf_model, data, output)
    cfg.logger.timing_log_level = 1
    cfg.logger.log_throughput = True
    runtime_config_update(cfg)

    state = GlobalState()
    state.cfg = cfg
    setup_output = setup(state)
    state = setup_output.state
    model = setup_output.model
    print_rank_0(f"layers: {get_model_config(model[0]).num_layers}")

    train(
        forward_step,
        model,
        setup_output.optimizer,
        setup_output.scheduler,
        setup_output.train_data_iterator,
        setup_output.valid_data_iterator,
        state,
        setup_output.checkpoint_manager,
        setup_output.pg_collection,
    )
    assert state.train_state.step == 2
    evaluate_and_print_results(
        state,
        f"iteration {state.train_state.step}",
        forward_step,
        setup_output.valid_data_iterator,
        model,
        cfg,
        verbose=True,
        write_to_tensorboard=False,
    )
    state.train_state.step += 1
    save_checkpoint(
        state,
        model,
        setup_output.optimizer,
        setup_output.scheduler,
        num_floating_point_operations_so_far=0,
        checkpointing_context=None,
        train_data_iterator=setup_output.train_data_iterator,
        pg_collection=setup_output.pg_collection,
    )
    destroy_global_state()
