"""How a module is patched and restored.

Its class changes to a subclass of its own class, so that hooks, `isinstance`, copies and replicas of it keep working,
and changes back. Nothing is bound to the instance and no class or function of other code is touched.
"""

import types
from typing import Any

from torch import nn

from ..errors import PatchError
from ..ops.truncation import Truncation
from .base import Adapter, PatchedMixer, PatchState, new_patched, patched_class
from .cache import FilterCache
from .precision import narrow, widen
from .truncation import restore, truncate


def is_patched(module: nn.Module) -> bool:
    """Whether a module has a patched class, or a class that another library has put on top of one."""
    return isinstance(module, PatchedMixer)


def patch_module(module: nn.Module, adapter: Adapter, cache: FilterCache) -> None:
    """Changes the class of a module that `adapter` has recognised."""
    mixer: Any = adapter.mixer
    original: Any = type(module)
    patched = patched_class(mixer, original)
    module.__class__ = patched
    module._flashfftconv = PatchState(adapter.family, cache=cache)
    _rebind(module, original, patched)


def configure(module: Any, backend: str, float32_filters: bool, truncation: Truncation | None) -> None:
    """Sets the options of a patched module."""
    state: PatchState = module._flashfftconv
    state.backend = backend
    restore(state.own_truncations)
    state.truncation = truncation
    state.own_truncations = [] if truncation is None else truncate(module.filter_modules(), truncation)
    if float32_filters == (state.widened is not None):
        return
    filters = module.filter_modules()
    if state.widened is None:
        state.widened = [widen(filter_fn) for filter_fn in filters]
    else:
        for filter_fn, widened in zip(filters, state.widened, strict=True):
            narrow(filter_fn, widened)
        state.widened = None
    for filter_fn in filters:
        # Filters of a float32 model are the same tensors still, but come out of autocast with another accuracy.
        state.cache.drop(filter_fn)


def check_restorable(module: nn.Module, name: str) -> None:
    """Raises `PatchError` where the patched class cannot be taken away."""
    if type(module).undo_first is not None:
        raise PatchError(f"{name} works on slices of its sequence; call {type(module).undo_first} first")
    if type(module)._flashfftconv_original not in type(module).__bases__:
        raise PatchError(
            f"{name} has the class {type(module).__name__}, which was built on top of the patched class; "
            "undo that first, then unpatch"
        )


def restore_module(module: Any) -> None:
    """Undoes [`patch_module`] and [`configure`]."""
    configure(module, module._flashfftconv.backend, float32_filters=False, truncation=None)
    patched: Any = type(module)
    original = patched._flashfftconv_original
    module.__class__ = original
    del module._flashfftconv
    _rebind(module, patched, original)


def make_twin(module: nn.Module, adapter: Adapter) -> Any:
    """A patched module that shares everything with an unpatched one, which stays as it is."""
    twin = new_patched(adapter.mixer, type(module))
    vars(twin).update(vars(module))
    twin._flashfftconv = PatchState(adapter.family, backend="torch", cache=FilterCache(0), twin=True)
    return twin


def _rebind(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Lets methods that other libraries have bound to the instance follow the change of its class.

    `kernelize` and the removal of an accelerate hook leave a bound copy of the class's own `forward`, which would hide
    the new one; an accelerate hook itself calls the one that it found, through `_old_forward`.
    """
    attributes = vars(module)
    for name in ("forward", "_old_forward"):
        bound = attributes.get(name)
        if isinstance(bound, types.MethodType) and bound.__func__ is old.forward:
            del attributes[name]
            if name == "_old_forward":
                attributes[name] = types.MethodType(new.forward, module)
