# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a run says and writes down: its blocks at start and end, its metrics file, a log of each rank."""

import json
import logging

from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

LAYOUTS = {
    "data": {},
    "tensor": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "pipeline, tied": {"pipeline_model_parallel_size": 2, "share_embeddings_and_output_weights": True},
    "experts": {"expert_model_parallel_size": 2, "num_moe_experts": 4, "moe_ffn_hidden_size": 32},
    "experts, tensor": {
        "expert_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_tensor_parallel_size": 1,
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 32,
    },
}
SIZES = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
}


def _counts(directory, layouts):
    """(all, trained) parameters by layout, with the final norm frozen."""
    from megatron.bridge.training.monitoring.summary import count_parameters
    from megatron.bridge.utils.distributed import destroy_model_parallel
    from tests.rigs.on_ranks import build_training

    found = {}
    for name, model in layouts.items():
        chunks, _, _ = build_training(tiny_config(directory, model=model))
        for chunk in chunks:
            for param_name, param in chunk.named_parameters():
                if param_name.endswith("final_layernorm.weight"):
                    param.requires_grad = False
        found[name] = count_parameters(chunks)
        destroy_model_parallel()
    return found


def test_each_parameter_is_counted_once_in_every_layout(tmp_path):
    alone = {
        name: {key: value for key, value in layout.items() if key not in SIZES} for name, layout in LAYOUTS.items()
    }
    [expected] = run_on_ranks(_counts, 1, tmp_path, alone)
    assert expected["data"] == (90432, 90432 - 64) and len(set(expected.values())) == 3
    for counted in run_on_ranks(_counts, 2, tmp_path, LAYOUTS):
        assert counted == expected


def _run(directory, train_iters):
    """What this rank logged."""
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    cfg = tiny_config(
        directory,
        train_iters=train_iters,
        model={"tensor_model_parallel_size": 2},
        optimizer={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0},
        checkpoint={"load": f"{directory}/checkpoints", "save_interval": 2},
        validation={"eval_iters": None, "eval_interval": 2},
        logger={"rank_log_dir": "${oc.env:NOT_SET_ANYWHERE,${checkpoint.save}}/../logs"},
    )
    pretrain(cfg, forward_step)
    logging.getLogger("megatron.bridge").debug("not shown")
    return (directory / "logs" / f"rank_{cfg.dist.local_rank:05d}.log").read_text()


def test_a_run_and_its_resume(tmp_path):
    for train_iters in (3, 5):
        logs = run_on_ranks(_run, 2, tmp_path, train_iters)
    first, second = logs
    assert first.count("run starts\n") == first.count("run ended\n") == 2
    block = first.partition("run starts\n")[2].split("\n20")[0]
    for said in (
        "Llama, 2 layers of 64, vocabulary 128; 90,432 parameters, 90,432 trained",
        "2: data 1 x tensor 2 x pipeline 1 x context 1",
        "weights bf16, gradients reduced in fp32",
        "linear, offload fraction 1\n",
        "0.5 MB on the device (weights 0.1 MB, gradients 0.2 MB, masters 0.2 MB) and activations; on the host 0.7 MB",
        "0 -> 3, 8 samples each: 4 micro-batches of 2 on each data-parallel rank",
        "training data    64 samples",
        f"{tmp_path}/checkpoints, every 2 steps and last; a new start resumes from there",
        f"{tmp_path}/checkpoints/metrics.jsonl",
    ):
        assert said in block, block
    assert len(block.splitlines()) < 25
    end = first.rpartition("run ended\n")[2]
    assert "5 of 5, 2 of them since this start" in end and f"{tmp_path}/checkpoints, step 5" in end
    assert "run starts" in second and "optimizer: adam" in second  # what each rank says of itself

    lines = [json.loads(line) for line in (tmp_path / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if line["split"] == "validation"] == [2, 3, 4, 5]
    for line in lines:
        names = {"step", "split", "lm loss", "num_tokens", "elapsed_seconds"}
        if line["split"] == "train":
            names |= {"learning_rate", "grad_norm", "step_seconds", "tokens_per_second", "peak_memory_bytes", "skipped"}
        assert line.keys() == names and all(value is not None for value in line.values())
