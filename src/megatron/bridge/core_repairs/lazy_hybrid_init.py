# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Let a hybrid optimizer copy the weights on first use instead of in its constructor.

Core builds two hybrid optimizers: one over the whole model, only to read its param groups and options, and from these
one over the shards that the rank owns. Each constructor copies its parameters to pinned host memory, which torch never
gives back. A rank thus needs host memory for the whole model. Here a hybrid makes its copies and sub-optimizers when
one of them is first accessed, which never happens to the one over the whole model.
"""

from typing import Any

import megatron.core.optimizer as core_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import Repair, ToBuild, source_of

_MADE_LATER = frozenset(HybridDeviceOptimizer._init_sub_optimizers.__code__.co_names)
"""Every name that Core's `_init_sub_optimizers` uses, and so every attribute that it sets."""


def _lazy_host_copies(base: type) -> type:
    """Overrides of `HybridDeviceOptimizer`."""

    class LazyHostCopies(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._is_asked = False
            super().__init__(*args, **kwargs)

        def _init_sub_optimizers(self) -> None:
            if self._is_asked:
                super()._init_sub_optimizers()

        def __getattr__(self, name: str) -> Any:
            if name not in _MADE_LATER or self._is_asked:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._is_asked = True
            self._init_sub_optimizers()
            return getattr(self, name)

    return LazyHostCopies


def _builds_twice(to_build: ToBuild) -> bool:
    over_the_model = source_of(core_optimizer._get_megatron_optimizer_based_on_param_groups)
    over_the_shards = source_of(DistributedOptimizer.__init__)
    builds_twice = all("= HybridDeviceOptimizer(" in source for source in (over_the_model, over_the_shards))
    return to_build.config.optimizer_cpu_offload and builds_twice


REPAIRS = (
    Repair(
        name="lazy hybrid init",
        defect="the whole model is copied to the host, to build the optimizer of a rank's part of it",
        threads=(),
        core_versions="0.16.1 to 0.19.2",
        target=HybridDeviceOptimizer,
        subclass=_lazy_host_copies,
        is_needed=_builds_twice,
        while_building=True,
    ),
)
