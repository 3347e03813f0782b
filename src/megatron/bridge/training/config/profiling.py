# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on profiles."""

from dataclasses import dataclass, field

from megatron.bridge.utils.section import BridgeSection


@dataclass(kw_only=True)
class ProfilingConfig(BridgeSection):
    """Which steps are profiled, with what, on which ranks."""

    _section = "profiling"

    profile_step_start: int = 10
    """First step that is profiled; they count from 0."""

    profile_step_end: int = 12
    """Step before which the profile ends."""

    use_pytorch_profiler: bool = False
    """Record the steps with torch's own profiler, into logger.tensorboard_dir/profile."""

    pytorch_profiler_collect_shapes: bool = False
    """Record tensor shapes (torch's profiler)."""

    pytorch_profiler_collect_callstack: bool = False
    """Record Python stacks (torch's profiler)."""

    pytorch_profiler_collect_chakra: bool = False
    """Write an execution trace for Chakra too, beside each profile (torch's profiler)."""

    use_nsys_profiler: bool = False
    """Let Nsight Systems record the steps. Needs a GPU, and a start under `nsys profile
    --capture-range=cudaProfilerApi`."""

    nvtx_ranges: bool = False
    """Name Core's phases for Nsight Systems. Needs a GPU."""

    record_memory_history: bool = False
    """Record each allocation on the device, from the start of training until the profile ends. Needs a GPU."""

    memory_snapshot_path: str = "snapshot.pickle"
    """File for that record, for pytorch.org/memory_viz; of ranks other than the first profiled one with _rank_00001 and
    so on."""

    profile_ranks: list[int] = field(default_factory=list)
    """Ranks that are profiled. Empty: rank 0."""

    record_shapes: bool = False
    """Record tensor shapes, with either profiler."""

    def finalize(self) -> None:
        """Check the section's own fields.

        Raises:
            ValueError: naming the field, what it holds and what it may hold.
        """
        if not 0 <= self.profile_step_start <= self.profile_step_end:
            raise ValueError(
                f"profiling.profile_step_start={self.profile_step_start} and profile_step_end={self.profile_step_end}: "
                "expected 0 <= start <= end; swap or change them"
            )
