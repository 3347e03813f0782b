# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The load cases: checkpoint options that name directories, and what a plan of them restores or why it is refused."""

RESUMED = {"optimizer": True, "scheduler": True, "rng": True, "train_state": True}
WEIGHTS_ONLY = {"optimizer": False, "scheduler": False, "rng": False, "train_state": False}
FRESH_OPTIMIZER = {**RESUMED, "optimizer": False, "scheduler": False}

PLANS = {
    "resume": ({"load": "full"}, "full/iter_0000002", RESUMED, ()),
    "resume from an iteration's folder": ({"load": "full/iter_0000001"}, "full/iter_0000001", RESUMED, ()),
    "load wins over pretrained": (
        {"load": "full", "pretrained_checkpoint": "pretrained"},
        "full/iter_0000002",
        RESUMED,
        (),
    ),
    "ckpt_step": ({"load": "full", "ckpt_step": 1}, "full/iter_0000001", RESUMED, ()),
    "load_optim=false": (
        {"load": "full", "load_optim": False},
        "full/iter_0000002",
        FRESH_OPTIMIZER,
        ("optimizer: checkpoint.load_optim=false",),
    ),
    "a run that saves no optimizer resumes with one": (
        {"load": "full", "save": "other", "save_optim": False},
        "full/iter_0000002",
        RESUMED,
        (),
    ),
    "saved without optimizer": (
        {"load": "no_optim"},
        "no_optim/iter_0000002",
        FRESH_OPTIMIZER,
        ("optimizer: the checkpoint has none",),
    ),
    "load_rng=false": (
        {"load": "full", "load_rng": False},
        "full/iter_0000002",
        {**RESUMED, "rng": False},
        ("rng: checkpoint.load_rng=false",),
    ),
    "saved without rng": (
        {"load": "no_rng"},
        "no_rng/iter_0000002",
        {**RESUMED, "rng": False},
        ("rng: the checkpoint has none",),
    ),
    "another layout, weights and step": (
        {"load": "full", "load_optim": False, "model": {"tensor_model_parallel_size": 2}},
        "full/iter_0000002",
        {**FRESH_OPTIMIZER, "rng": False},
        ("optimizer: checkpoint.load_optim=false", "rng: TP 1 -> 2"),
    ),
    "another layout, reshardable": (
        {"load": "any_layout", "model": {"pipeline_model_parallel_size": 2}},
        "any_layout/iter_0000002",
        {**RESUMED, "rng": False},
        ("rng: PP 1 -> 2",),
    ),
    "another layout of experts, reshardable": (
        {"load": "any_layout", "model": {"num_moe_experts": 4, "expert_model_parallel_size": 2}},
        "any_layout/iter_0000002",
        RESUMED,
        (),
    ),
    "finetune=true": (
        {"load": "full", "finetune": True},
        "full/iter_0000002",
        WEIGHTS_ONLY,
        ("checkpoint.finetune=true",),
    ),
    "pretrained root": (
        {"pretrained_checkpoint": "pretrained"},
        "pretrained/iter_0000000",
        WEIGHTS_ONLY,
        ("pretrained weights",),
    ),
    "pretrained iteration": (
        {"pretrained_checkpoint": "full/iter_0000001"},
        "full/iter_0000001",
        WEIGHTS_ONLY,
        ("pretrained weights",),
    ),
    "pretrained, nothing to resume yet": (
        {"load": "empty", "save": "empty", "pretrained_checkpoint": "pretrained"},
        "pretrained/iter_0000000",
        WEIGHTS_ONLY,
        ("pretrained weights",),
    ),
    "pretrained Hugging Face directory": (
        {"pretrained_checkpoint": "hf"},
        "hf",
        WEIGHTS_ONLY,
        ("pretrained weights",),
    ),
    "release": ({"load": "released"}, "released/release", WEIGHTS_ONLY, ("a release checkpoint",)),
    "pretrained release": (
        {"pretrained_checkpoint": "released"},
        "released/release",
        WEIGHTS_ONLY,
        ("pretrained weights",),
    ),
}
"""Options of `checkpoint`, the path that is read, what is restored, and the reasons for what is not."""

REFUSALS = {
    "missing iteration": (
        {"load": "full", "ckpt_step": 7},
        FileNotFoundError,
        r"checkpoint.load='.*full' has no iteration 7 \(checkpoint.ckpt_step\); there: 1, 2; name one of these",
    ),
    "half-written": (
        {"load": "half"},
        ValueError,
        r"iter_0000002 \(checkpoint.load\) is not a complete checkpoint: metadata.json is missing: .*"
        r"complete iterations there: 1 \(checkpoint.ckpt_step\)",
    ),
    "half-written iteration's folder, despite pretrained": (
        {"load": "half/iter_0000002", "pretrained_checkpoint": "pretrained"},
        ValueError,
        "metadata.json is missing",
    ),
    "half-written, pretrained": (
        {"pretrained_checkpoint": "half"},
        ValueError,
        r"iter_0000002 \(checkpoint.pretrained_checkpoint\) is not a complete checkpoint",
    ),
    "no configuration": ({"load": "no_config"}, FileNotFoundError, "run_config.yaml is missing: expected the config"),
    "damaged configuration": ({"load": "damaged"}, ValueError, "run_config.yaml can't be read: expected plain YAML"),
    "another layout": (
        {"load": "full", "model": {"pipeline_model_parallel_size": 2}},
        ValueError,
        r"iter_0000002 \(checkpoint.load\) holds optimizer state of another layout \(PP 1 -> 2\).*"
        "dist_ckpt_optim_fully_reshardable=true it fits any.*load_optim=false",
    ),
    "another layout, whatever this run saves": (
        {
            "load": "full",
            "dist_ckpt_optim_fully_reshardable": True,
            "model": {"tensor_model_parallel_size": 2},
        },
        ValueError,
        r"holds optimizer state of another layout \(TP 1 -> 2\)",
    ),
    "another layout of experts": (
        {"load": "full", "model": {"num_moe_experts": 4, "expert_model_parallel_size": 2}},
        ValueError,
        r"another layout \(EP 1 -> 2\), which can't be resharded: use the checkpoint's parallel sizes \(saved from",
    ),
    "resume from Hugging Face": (
        {"load": "hf"},
        ValueError,
        r"checkpoint.load='.*hf' is a Hugging Face directory.*set checkpoint.pretrained_checkpoint to it",
    ),
    "nothing in pretrained": (
        {"pretrained_checkpoint": "empty"},
        FileNotFoundError,
        "checkpoint.pretrained_checkpoint='.*empty' holds no checkpoint: .*latest_checkpointed_iteration.txt is miss",
    ),
    "finetune of nothing": ({}, FileNotFoundError, "neither checkpoint.load nor checkpoint.pretrained_checkpoint is"),
    "finetune, load missing": (
        {"load": "empty", "save": "empty"},
        FileNotFoundError,
        "checkpoint.load='.*empty' holds no checkpoint .* and checkpoint.pretrained_checkpoint is not set",
    ),
}
"""Options that a finetune is refused with, the error, and its text."""

REFUSALS_OF_PRETRAIN = {
    "load missing and not save": (
        {"load": "empty", "save": "other"},
        "checkpoint.load='.*empty' holds no checkpoint .*: the run would start from random weights; correct the path",
    ),
    "load missing, nothing saved": ({"load": "nowhere"}, "would start from random weights"),
    "exit_on_missing_checkpoint": (
        {"load": "empty", "save": "empty", "exit_on_missing_checkpoint": True},
        "holds no checkpoint .*, and checkpoint.exit_on_missing_checkpoint=true",
    ),
}
"""Options that a pretraining is refused with, and the text of its FileNotFoundError."""

LOCAL, FULL_2 = "/local/0/file.pt", "full/iter_0000002"
LOCAL_PLANS = {
    "alone": ({}, {"step": 1}, LOCAL, RESUMED),
    "newer": ({"load": "full"}, {"step": 3}, LOCAL, RESUMED),
    "as new": ({"load": "full"}, {"step": 2}, LOCAL, RESUMED),
    "older": ({"load": "full"}, {"step": 1}, FULL_2, RESUMED),
    "pretrained named too": ({"pretrained_checkpoint": "pretrained"}, {"step": 1}, LOCAL, RESUMED),
    "newer than a release": ({"load": "released"}, {"step": 1}, LOCAL, RESUMED),
    "ckpt_step": ({"load": "full", "ckpt_step": 1}, {"step": 3}, "full/iter_0000001", RESUMED),
    "an iteration's folder": ({"load": "full/iter_0000001"}, {"step": 3}, "full/iter_0000001", RESUMED),
    "finetune=true": ({"load": "full", "finetune": True}, {"step": 3}, FULL_2, WEIGHTS_ONLY),
    "load_optim=false": ({"load_optim": False}, {"step": 1}, LOCAL, FRESH_OPTIMIZER),
    "saved without optimizer": ({}, {"step": 1, "holds_optimizer": False}, LOCAL, FRESH_OPTIMIZER),
    "load_rng=false": ({"load_rng": False}, {"step": 1}, LOCAL, {**RESUMED, "rng": False}),
    "saved without rng": (
        {},
        {"step": 1, "checkpoint": {"save_rng": False}},
        LOCAL,
        {**RESUMED, "rng": False},
    ),
}
"""Options, what `local_of` is asked for, the path that is read, and what is restored."""
