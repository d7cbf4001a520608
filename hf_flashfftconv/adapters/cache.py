"""Filters that are generated once in evaluation instead of in every call."""

import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

DEFAULT_CACHE_BYTES = 1 << 30

# Causal taps and anticausal taps, (channels, length) each, and skip weights.
Filters = tuple[Tensor, Tensor | None, Tensor | None]


# Attributes of every module that have no part in what it computes.
_BOOKKEEPING = vars(nn.Module()).keys() - {
    *("training", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
}


class _Stamp:
    """What a filter was computed from; the objects are held, so that no other object can take over their identity.

    It is compared in every call, by loops in C over all attributes: loops in Python take ten times as long.
    """

    def __init__(self, module: nn.Module, tensors: list[Tensor]) -> None:
        # Without the module itself, with which the entries die.
        self.parts, self.tensors = [*module.modules()][1:], tensors
        self.attributes = [vars(part) for part in module.modules()]
        # At least the six names above, so that each getter returns a tuple.
        self.getters = [itemgetter(*(names.keys() - _BOOKKEEPING)) for names in self.attributes]
        self.mappings: list[dict[Any, Any]] = []
        # What has changed in length has changed.
        self.lengths = [*self.attributes]
        for part in module.modules():
            self.mappings += part._parameters, part._buffers, part._modules
            self.lengths += part._forward_hooks, part._forward_pre_hooks
        self.objects = [*self._objects(module)]
        self.numbers = self._numbers(module)

    def holds(self, module: nn.Module) -> bool:
        """Whether nothing has changed since, for the same module."""
        try:
            return self._numbers(module) == self.numbers
        except KeyError:
            return False

    def _objects(self, module: nn.Module) -> Iterable[Any]:
        attributes = [getter(names) for getter, names in zip(self.getters, self.attributes, strict=True)]
        return chain((type(module),), map(type, self.parts), *attributes, *map(dict.values, self.mappings))

    def _numbers(self, module: nn.Module) -> list[int]:
        versions, addresses = map(attrgetter("_version"), self.tensors), map(Tensor.data_ptr, self.tensors)
        return [*map(id, self._objects(module)), *map(len, self.lengths), *versions, *addresses]


class _LayerStamp:
    """The same for a linear layer that is nothing but its weights, which callers know, in a tenth of the time."""

    def __init__(self, layer: nn.Module) -> None:
        self.tensors = [*layer._parameters.values()]
        self.numbers = self._numbers(layer)

    def holds(self, layer: nn.Module) -> bool:
        """Whether nothing has changed since, for the same layer."""
        return self._numbers(layer) == self.numbers

    @staticmethod
    def _numbers(layer: nn.Module) -> list[Any]:
        return [None if x is None else (id(x), x._version, x.data_ptr()) for x in layer._parameters.values()]


@dataclass
class _Entry:
    filters: Filters
    stamp: "_Stamp | _LayerStamp"

    @property
    def bytes(self) -> int:
        return _bytes(self.filters)


class FilterCache:
    """Bounded store of generated filters and cast weights, shared by the modules of one patched model.

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

    def resize(self, max_bytes: int) -> None:
        """Sets the bound, and forgets all filters if they take more."""
        with self._lock:
            self.max_bytes = max_bytes
            if self._bytes() > max_bytes:
                self._entries.clear()

    def _bytes(self) -> int:
        return sum(entry.bytes for entries in self._entries.values() for entry in entries.values())

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of a model, in memory or in a file, start with an empty cache of the same size.
        return FilterCache, (self.max_bytes,)

    def get(self, module: nn.Module, key: tuple[Hashable, ...], generate: Callable[[], Filters]) -> Filters:
        """Returns `generate()`, or the tensors that it returned for the same key if nothing has changed since.

        The tensors that are kept are the same objects in every call, need no gradient and are contiguous, so that what
        is computed from them can be kept too.

        Args:
            module (`nn.Module`): The module that the filter is computed by.
            key (`tuple`): What else the filter depends on; its first item is the length, or None for weights of a
                layer, which are kept the same way but push nothing out.
            generate (`Callable`): Computes the filters.
        """
        with self._lock:
            entries = self._entries.get(module)
            entry = None if entries is None else entries.get(key)
        if entry is not None and entry.stamp.holds(module):
            return entry.filters
        if self.max_bytes == 0 or _stamp(module) is None:
            self.drop(module)
            return generate()
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
        excess = needed - self.max_bytes + self._bytes()
        for entries in self._entries.values() if length is not None else ():
            for key in [key for key in entries if key[0] != length]:
                if excess > 0:
                    excess -= entries.pop(key).bytes
        return excess <= 0


def _bytes(filters: Filters) -> int:
    """Memory of the taps; the skip weights are the module's own."""
    return sum(taps.numel() * taps.element_size() for taps in filters[:2] if taps is not None)


def _stamp(module: nn.Module) -> _Stamp | _LayerStamp | None:
    """Everything that the output of `module` depends on, or `None` where this cannot be known."""
    found = []
    for part in module.modules():
        # Hooks and overridden forwards may do anything, and so may dropout. A layer inside a layer is an adapter or a
        # parametrization, which may be switched on and off without a trace.
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks or _is_wrapped(part, module):
            return None
        if part.training:
            return None
        # Tables may be plain attributes too.
        for tensor in (*part._parameters.values(), *part._buffers.values(), *_tensors(part)):
            if tensor is None:
                continue
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.is_inference():
                return None
            found.append(tensor)
    return _LayerStamp(module) if type(module) is nn.Linear else _Stamp(module, found)


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
        and not vars(module).get("_is_replica", False)
        # Sharded weights are gathered into the same memory at the same version, whatever they are.
        and not vars(module).get("_is_fsdp_managed_module", False)
    )
