# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on profiles."""

from dataclasses import dataclass, field

from megatron.bridge.utils.section import Section


@dataclass(kw_only=True)
class ProfilingConfig(Section):
    """Which steps are profiled, with what, on which ranks."""

    use_nsys_profiler: bool = False
    """Mark the steps for Nsight Systems (start the run under nsys)."""

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
    """Write a Chakra execution trace (torch's profiler)."""

    profile_ranks: list[int] = field(default_factory=list)
    """Ranks that are profiled. Empty: rank 0."""

    record_memory_history: bool = False
    """Record each allocation on the device."""

    memory_snapshot_path: str = "snapshot.pickle"
    """File for the record of allocations."""

    record_shapes: bool = False
    """Record tensor shapes, with either profiler."""

    nvtx_ranges: bool = False
    """Mark Core's own phases (Nsight Systems)."""

    def finalize(self) -> None:
        """Check the section's own fields.

        Raises:
            ValueError: naming the field, what it holds and what it may hold.
        """
        if self.use_nsys_profiler and self.use_pytorch_profiler:
            raise ValueError(
                "profiling.use_nsys_profiler and profiling.use_pytorch_profiler are both true: "
                "one profiler can run at a time; set one of them to false"
            )
        if not 0 <= self.profile_step_start <= self.profile_step_end:
            raise ValueError(
                f"profiling.profile_step_start={self.profile_step_start} and profile_step_end={self.profile_step_end}: "
                "expected 0 <= start <= end; swap or change them"
            )
