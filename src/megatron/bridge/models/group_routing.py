# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Experts in groups: a token first chooses groups, then experts within them.

Core ranks groups by their best `moe_router_topk // moe_router_group_topk` experts. transformers ranks them by a fixed
number, whatever those two are.

Shapes: T tokens, E experts, G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter

from megatron.bridge.models.decoder import ExpertsModelProvider

Chosen = tuple[torch.Tensor, torch.Tensor]
"""Scores and numbers of the chosen experts, [T, topk] each."""


@dataclass
class GroupedRouterModelProvider(ExpertsModelProvider):
    """Experts that may stand in groups, `moe_router_num_groups`, of which a token takes `moe_router_group_topk`."""

    moe_router_group_best: int = 2
    """The number of best experts of a group whose scores, added up, rank it among the groups."""

    def finalize(self) -> None:
        """As for every provider.

        Raises:
            ValueError: Also for a fused kernel that ranks groups otherwise.
        """
        if self.moe_router_fusion and self._ranks_otherwise:
            raise ValueError(
                f"model.moe_router_fusion=True ranks groups of experts otherwise than by their best "
                f"{self.moe_router_group_best}: set it to False"
            )
        super().finalize()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build one bare chunk. See `GPTModelProvider.provide`."""
        model = super().provide(pre_process, post_process, vp_stage)
        if self._ranks_otherwise:
            for router in (module for module in model.modules() if isinstance(module, TopKRouter)):
                router.router_replay = GroupsByBest(self.moe_router_group_best)
        return model

    @property
    def _ranks_otherwise(self) -> bool:
        chosen = self.moe_router_group_topk
        return bool(self.num_moe_experts and chosen) and self.moe_router_topk // (chosen or 1) != (
            self.moe_router_group_best
        )


class GroupsByBest:
    """Stands where Core's router may have a record of its choices to replay, and chooses.

    Args:
        best: As `moe_router_group_best`.
    """

    def __init__(self, best: int) -> None:
        self.best = best

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int, group_topk: int, _core: Callable[..., Chosen]
    ) -> Chosen:
        """The best experts of the best groups, for scores [T, E] of any dtype."""
        in_groups = scores.view(len(scores), num_groups, -1)
        of_groups = in_groups.topk(self.best, dim=-1).values.sum(dim=-1)
        taken = torch.zeros_like(of_groups, dtype=torch.bool)
        taken.scatter_(1, of_groups.topk(group_topk, dim=-1).indices, True)
        return in_groups.masked_fill(~taken[..., None], float("-inf")).view_as(scores).topk(topk, dim=-1)


def group_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of a Hugging Face configuration; none where each token may take the experts of all of them.

    Raises:
        ValueError: The groups that a token takes have fewer experts than it takes.
    """
    groups, taken, topk = hf["n_group"] or 1, hf["topk_group"] or 1, hf["num_experts_per_tok"]
    if taken >= groups:
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    experts = hf["n_routed_experts"]
    if experts % groups or taken * experts // groups < topk:
        raise ValueError(
            f"config.json: num_experts_per_tok={topk} out of topk_group={taken} of n_group={groups} groups of "
            f"n_routed_experts={experts}: expected groups of one size, with enough experts; correct those keys"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": taken}
