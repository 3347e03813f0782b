# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Routers' losses as a run shows them equal those computed from the routers' logits, in every layout.

Shapes: S sequence, B micro-batch, E experts.
"""

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron.bridge.data.config import DatasetProvider
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import SEQ_LENGTH, VOCAB_SIZE, tiny_config

EXPERTS, TOPK, STEPS = 4, 2, 2
ALL = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.02, 0.03, 0.05],
    "moe_z_loss_coeff": 0.01,
    "moe_router_dtype": "fp32",
    "moe_per_layer_logging": True,
}


@dataclass
class OneLength(DatasetProvider):
    """Samples of one length, so that a mean over micro-batches is one over tokens."""

    def build_datasets(self, context: Any) -> tuple[Any, Any, Any]:
        generator = torch.Generator().manual_seed(3)
        rows = torch.randint(VOCAB_SIZE, (48, SEQ_LENGTH + 1), generator=generator)
        samples = [{"tokens": row[:-1], "labels": row[1:], "loss_mask": torch.ones(SEQ_LENGTH)} for row in rows]
        return samples[:40], samples[40:], None


def _run(directory, model, **sections):
    """What one rank's routers saw in each step, with its place, what the run showed, and the log."""
    from megatron.core import mpu

    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.monitoring.metrics import read_metrics
    from megatron.bridge.training.pretrain import pretrain
    from tests.rigs.on_ranks import forget_last_forward

    steps, seen, lines = [], [], []

    class Watch(Callback):
        def on_train_start(self, context):
            for chunk in context.model:
                for router in (module for module in chunk.modules() if hasattr(module, "get_aux_loss_coeff")):
                    router.register_forward_hook(self.see)
            self.place = {
                "data": mpu.get_data_parallel_rank(),
                "tensor": mpu.get_tensor_model_parallel_rank(),
            }

        def see(self, router, inputs, _output):
            if router.training and torch.is_grad_enabled():
                with torch.no_grad():
                    seen.append((router.layer_number - 1, router.gating(inputs[0]).float()))

        def on_train_step_end(self, context):
            steps.append(list(seen))
            seen.clear()

        def on_train_end(self, context):
            forget_last_forward(context.model)

    sizes = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    sizes["init_method_std"] = 0.2  # experts are used unevenly
    model = {**sizes, "num_moe_experts": EXPERTS, "moe_router_topk": TOPK, "moe_ffn_hidden_size": 16, **model}
    cfg = tiny_config(
        directory,
        train_iters=STEPS,
        model=model,
        logger={"metrics_file": f"{directory}/metrics.jsonl", "log_interval": 1},
        validation={"eval_interval": 1, "eval_iters": 1},  # must not count in the next step
        checkpoint={"save": None},
        **sections,
    )
    cfg.dataset = OneLength()
    watch, handler = Watch(), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron.bridge").addHandler(handler)
    try:
        pretrain(cfg, forward_step, [watch])
    finally:
        logging.getLogger("megatron.bridge").removeHandler(handler)
    shown = [line for line in read_metrics(f"{directory}/metrics.jsonl") if line["split"] == "train"]
    return {**watch.place, "steps": steps, "shown": shown, "log": "\n".join(lines)}


def _balance(logits, counts, *, num_tokens):
    """E times the sum over experts of the part of tokens that they were given and of their mean probability."""
    probabilities = logits.reshape(-1, EXPERTS).softmax(-1).sum(0) / num_tokens
    return float(EXPERTS * (counts / (TOPK * num_tokens) * probabilities).sum())


def _counts(logits):
    """How many tokens each expert is given, [E]."""
    best = logits.reshape(-1, EXPERTS).topk(TOPK, dim=-1).indices
    return torch.bincount(best.flatten(), minlength=EXPERTS).float()


def _expected(ranks, step):
    """Each loss of each layer, from what the routers' inputs were: {name: {layer: mean}}."""
    micro_batches: dict[int, dict[int, list[list[torch.Tensor]]]] = {}  # layer, data-parallel rank, then in order
    for rank in sorted(ranks, key=lambda rank: rank["tensor"]):
        count: dict[int, int] = {}
        for layer, logits in rank["steps"][step]:
            of_rank = micro_batches.setdefault(layer, {}).setdefault(rank["data"], [])
            number = count[layer] = count.get(layer, -1) + 1
            if number == len(of_rank):
                of_rank.append([])
            of_rank[number].append(logits)
    found: dict[str, dict[int, float]] = {}
    for layer, of_data_ranks in micro_batches.items():
        whole = {rank: [torch.cat(parts) for parts in of_rank] for rank, of_rank in of_data_ranks.items()}  # [S, B, E]
        every = [logits for of_rank in whole.values() for logits in of_rank]
        rounds = [torch.cat(parts, dim=1) for parts in zip(*whole.values(), strict=True)]
        given = [torch.stack([_counts(logits) for logits in rounds[: n + 1]]).mean(0) for n in range(len(rounds))]
        by_name = {
            "load_balancing_loss": [_balance(m, _counts(m), num_tokens=m.shape[0] * m.shape[1]) for m in every],
            "seq_load_balancing_loss": [
                _balance(m[:, b], _counts(m[:, b]), num_tokens=m.shape[0]) for m in every for b in range(m.shape[1])
            ],
            "global_load_balancing_loss": [
                _balance(m, counts, num_tokens=m.shape[0] * m.shape[1]) for m, counts in zip(rounds, given, strict=True)
            ],
            "z_loss": [float(m.logsumexp(-1).square().mean()) for m in every],
        }
        for name, values in by_name.items():
            found.setdefault(name, {})[layer] = sum(values) / len(values)
    return found


def _tolerance(name):
    """Core keeps the mean of what experts were given so far in 16 bits."""
    return 2e-3 if name == "global_load_balancing_loss" else 1e-5


LAYOUTS = {
    "DP 2": {},
    "EP 2": {"expert_model_parallel_size": 2},
    "TP 2, SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1},
    "PP 2, experts on one stage": {
        "pipeline_model_parallel_size": 2,
        "pipeline_dtype": torch.bfloat16,
        "moe_layer_freq": [0, 0, 1, 1],
    },
    "PP 2, VP 2, recomputed": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
        "pipeline_dtype": torch.bfloat16,
        "num_layers": 8,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}

LAYERS = {"PP 2, experts on one stage": [2, 3], "PP 2, VP 2, recomputed": list(range(8))}
"""Those with experts, where not the first four."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_shown_is_what_the_routers_logits_give(tmp_path, layout):
    ranks = run_on_ranks(_run, 2, tmp_path, {**LAYOUTS[layout], **ALL})
    for step, line in enumerate(ranks[0]["shown"]):
        expected = _expected(ranks, step)
        assert sorted(expected["z_loss"]) == LAYERS.get(layout, [0, 1, 2, 3])
        for name, of_layers in expected.items():
            assert line[name] == pytest.approx(sum(of_layers.values()) / len(of_layers), rel=_tolerance(name)), (
                step,
                name,
            )
            for layer, value in of_layers.items():
                assert line[f"moe/{name}_layer_{layer}"] == pytest.approx(value, rel=_tolerance(name)), (
                    step,
                    name,
                    layer,
                )
            assert f"{name} {line[name]:.3f}" in ranks[0]["log"]
        assert sum(name.startswith("moe/") for name in line) == sum(map(len, expected.values()))
    assert len(ranks[0]["shown"]) == STEPS


def _runs(directory, models):
    from megatron.bridge.utils.distributed import destroy_model_parallel

    names = []
    for number, model in enumerate(models):
        shown = _run(directory / str(number), model)["shown"][0]
        names.append({name for name in shown if "load_bal" in name or "z_loss" in name})
        destroy_model_parallel()
    return names


def test_losses_that_are_not_in_force_are_not_shown_and_another_model_may_follow(tmp_path):
    without = {"num_layers": 1, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0, "moe_per_layer_logging": True}
    dense = {**without, "num_moe_experts": None, "moe_ffn_hidden_size": None}
    small, large = ({"moe_aux_loss_coeff": 0.01, "num_layers": num_layers} for num_layers in (1, 2))
    [shown] = run_on_ranks(_runs, 1, tmp_path, (small, without, dense, large))
    assert shown == [{"load_balancing_loss"}, set(), set(), {"load_balancing_loss"}]
