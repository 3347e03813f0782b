# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Device memory that is given back while another stream still reads it: what `record_stream` is for.

CUDA's allocator gives memory that a program lets go to the next tensor of the stream on which it was made, at once. It
knows nothing of other streams, unless `record_stream` names them. Here such memory is overwritten at the moment when
the stream of its making reaches the place at which it was let go, as the next tensor there may do.

Not simulated: a queued write into memory that was given back, which would damage its next owner.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from tests.rigs.device_queues import Stream


def _uses(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


_ONE_USE = _uses(torch.empty(1))
"""What torch counts where one tensor uses a storage."""


class _Used:
    """Memory that queued work uses."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = torch.ops.aten.alias.default(tensor)
        self.by: Counter[Stream] = Counter()
        """How many of the queue's tensors each stream's work holds."""

    @property
    def is_let_go(self) -> bool:
        """Whether the queue alone holds it."""
        return _uses(self.tensor) - _ONE_USE == self.by.total()


class FreedMemory:
    """Sees which memory queued work uses, and overwrites what is given back too early."""

    def __init__(self, default: Stream) -> None:
        self._default = default
        self._made_on: dict[int, tuple[StorageWeakRef, Stream]] = {}
        """By storage, where that isn't the default stream. The reference keeps another from having its address."""
        self._recorded: defaultdict[int, set[Stream]] = defaultdict(set)
        self._used: dict[int, _Used] = {}
        self._shared: set[int] = set()
        """Of these, what another stream than that of its making uses, and was not overwritten yet."""

    def made(self, tensors: list[torch.Tensor], stream: Stream) -> None:
        """New tensors: another one that had the same storage is gone."""
        for tensor, storage in zip(tensors, _storages(tensors), strict=True):
            self._recorded.pop(storage, None)
            if stream is not self._default:
                self._made_on[storage] = StorageWeakRef(tensor.untyped_storage()), stream
        if len(self._made_on) > 1000:
            self._made_on = {at: made for at, made in self._made_on.items() if not made[0].expired()}

    def _maker(self, storage: int) -> Stream:
        return self._made_on[storage][1] if storage in self._made_on else self._default

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        """`record_stream`: the memory isn't given back before the stream has got here."""
        self._recorded[tensor.untyped_storage()._cdata].add(stream)

    def hold(self, tensors: list[torch.Tensor], stream: Stream) -> None:
        """Work was queued that holds these tensors, of which nobody else knows."""
        for tensor, storage in zip(tensors, _storages(tensors), strict=True):
            if storage not in self._used:
                self._used[storage] = _Used(tensor)
            used = self._used[storage]
            used.by[stream] += 1
            if stream is not self._maker(storage):
                self._shared.add(storage)

    def release(self, tensors: list[torch.Tensor], stream: Stream) -> None:
        """That work has run."""
        for storage in _storages(tensors):
            used = self._used[storage]
            used.by[stream] -= 1
            if not used.by.total():
                del self._used[storage]
                self._shared.discard(storage)

    def look(self) -> None:
        """Overwrite what was let go since the last look while others than its stream read it."""
        with torch._C.DisableTorchFunction():
            for storage in list(self._shared):
                used = self._used[storage]
                if not used.is_let_go:
                    continue
                self._shared.discard(storage)
                made_on = self._maker(storage)
                readers = {stream for stream, count in used.by.items() if count} - {made_on}
                if readers - self._recorded[storage]:
                    _overwrite_later(used.tensor, made_on)


def _overwrite_later(tensor: torch.Tensor, stream: Stream) -> None:
    with _disable_current_modes():
        whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())

    def overwrite() -> None:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            whole.fill_(255)  # NaN, or -1

    stream.issue(overwrite)


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[int]:
    return (tensor.untyped_storage()._cdata for tensor in tensors)
