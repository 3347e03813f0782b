# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The energy that the devices of a run use, one a rank, as the driver counts it."""

import time

import torch
import torch.distributed as dist

from megatron.bridge.utils.device import EnergyCounter, current_device


class Energy:
    """Means over devices of the steps since the last reading."""

    def __init__(self) -> None:
        """Find this rank's device.

        Raises:
            ValueError: Its energy can't be read here.
        """
        try:
            self._counter = EnergyCounter()
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"logger.log_energy=true: {error}; it needs a GPU that counts its energy and the package "
                "nvidia-ml-py: install that, or set logger.log_energy=false"
            ) from error
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self._joules, self._at, self._steps = self._counter.joules(), time.monotonic(), 0

    def count_step(self) -> None:
        """A step was taken."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Joules of a step and watts, and start again. Collective."""
        seconds = time.monotonic() - self._at
        used = torch.tensor(self._counter.joules() - self._joules, dtype=torch.float64, device=current_device())
        dist.all_reduce(used)
        mean, steps = float(used) / dist.get_world_size(), max(self._steps, 1)
        self.start()
        return {"energy_joules_per_device": mean / steps, "power_watts_per_device": mean / seconds}
