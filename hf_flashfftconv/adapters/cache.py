"""Filters that are generated once in evaluation instead of in every call."""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

DEFAULT_CACHE_BYTES = 1 << 30

# Causal taps and anticausal taps, (channels, length) each, and skip weights.
Filters = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass
class _Stamp:
    """What a filter was computed from; the objects are held, so that no other object can take over their identity."""

    objects: list[Any]
    numbers: list[int]


@dataclass
class _Entry:
    filters: Filters
    stamp: _Stamp

    @property
    def bytes(self) -> int:
        return _bytes(self.filters)


class FilterCache:
    """Bounded store of generated filters, shared by the modules of one patched model.

    An entry is used again only while nothing that the filter is computed from has changed: the tensors are the same
    objects in the same memory at the same version, and every sub-module has the same class and attributes. One thing
    leaves no trace, a write into `parameter.data`; therefore `train()` and `eval()` drop the entries of a module too.

    Args:
        max_bytes (`int`): Bound on the memory of all entries; 0 turns the cache off.
    """

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._entries: WeakKeyDictionary[nn.Module, dict[tuple[Hashable, ...], _Entry]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of a model, in memory or in a file, start with an empty cache of the same size.
        return FilterCache, (self.max_bytes,)

    def get(self, module: nn.Module, key: tuple[Hashable, ...], generate: Callable[[], Filters]) -> Filters:
        """Returns `generate()`, or the tensors that it returned for the same key if nothing has changed since.

        The tensors that are kept are the same objects in every call, need no gradient and are contiguous, so that what
        is computed from them can be kept too.

        Args:
            module (`nn.Module`): The module that the filter is computed by.
            key (`tuple`): What else the filter depends on; its first item is the length.
            generate (`Callable`): Computes the filters.
        """
        stamp = _stamp(module) if self.max_bytes > 0 else None
        if stamp is None:
            self.drop(module)
            return generate()
        with self._lock:
            entry = self._entries.get(module, {}).get(key)
        if entry is not None and entry.stamp.numbers == stamp.numbers:
            return entry.filters
        self.drop(module, key)
        # Tensors made in inference mode have no version, so nothing could be kept for them elsewhere.
        with torch.inference_mode(False), torch.no_grad():
            k, k_rev, skip = generate()
        # Generating may itself replace what lazily built modules hold.
        stamp = _stamp(module)
        if stamp is None or type(k) is not Tensor:
            return k, k_rev, skip
        with torch.inference_mode(False), self._lock:
            if not self._make_room(_bytes((k, k_rev, skip)), length=key[0]):
                return k, k_rev, skip
            k_rev = None if k_rev is None else k_rev.contiguous()
            entry = _Entry((k.contiguous(), k_rev, None if skip is None else skip.detach()), stamp)
            self._entries.setdefault(module, {})[key] = entry
        return entry.filters

    def drop(self, module: nn.Module, key: tuple[Hashable, ...] | None = None) -> None:
        """Forgets the filters of a module, or one of them."""
        with self._lock:
            if key is None:
                self._entries.pop(module, None)
            elif module in self._entries:
                self._entries[module].pop(key, None)

    def _make_room(self, needed: int, length: Hashable) -> bool:
        """Forgets filters of other lengths, never of this one: the layers of one pass must not evict each other."""
        excess = needed - self.max_bytes
        excess += sum(entry.bytes for entries in self._entries.values() for entry in entries.values())
        for entries in self._entries.values():
            for key in [key for key in entries if key[0] != length]:
                if excess > 0:
                    excess -= entries.pop(key).bytes
        return excess <= 0


def _bytes(filters: Filters) -> int:
    """Memory of the taps; the skip weights are the module's own."""
    return sum(taps.numel() * taps.element_size() for taps in filters[:2] if taps is not None)


def _stamp(module: nn.Module) -> _Stamp | None:
    """Everything that the output of `module` depends on, or `None` where this cannot be known."""
    objects: list[Any] = []
    numbers: list[int] = []
    for part in module.modules():
        # Hooks and overridden forwards may do anything, and so may dropout. A layer inside a layer is an adapter or a
        # parametrization, which may be switched on and off without a trace.
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks or _is_wrapped(part, module):
            return None
        if part.training:
            return None
        objects.append(type(part))
        objects.extend(vars(part).values())
        # Tables may be plain attributes too.
        for tensor in (*part._parameters.values(), *part._buffers.values(), *_tensors(part)):
            if tensor is None:
                continue
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.is_inference():
                return None
            objects.append(tensor)
            numbers += (tensor._version, tensor.data_ptr())
    return _Stamp(objects, [*map(id, objects), *numbers])


def _tensors(part: nn.Module) -> list[Tensor]:
    return [value for value in vars(part).values() if isinstance(value, Tensor)]


def _is_wrapped(part: nn.Module, root: nn.Module) -> bool:
    return part is not root and bool(part._modules) and not isinstance(part, nn.Sequential)


def may_cache(module: nn.Module) -> bool:
    """Whether filters may be kept between calls of `module`: plain inference, outside of any tracing."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not module.training
        and not getattr(module, "_is_replica", False)
        # Sharded weights are gathered into the same memory at the same version, whatever they are.
        and not getattr(module, "_is_fsdp_managed_module", False)
    )
