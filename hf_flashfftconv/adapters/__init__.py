"""The families of long-convolution modules that can be patched, and how they are found in a model."""

from dataclasses import dataclass

from torch import nn

from .base import Adapter
from .evo2 import EVO2
from .fla import IMPLICIT_LONG_CONVOLUTION, LONG_CONVOLUTION
from .h3 import H3
from .hyena import HYENADNA, SAFARI
from .m2 import M2
from .probe import disagreement
from .s4 import FFT_CONV, LONG_CONV, S4D
from .stripedhyena import STRIPEDHYENA
from .structure import Unsupported
from .stu import STU
from .swap import is_patched

_ADAPTERS: list[Adapter] = [
    *(HYENADNA, SAFARI, M2, STRIPEDHYENA, EVO2),
    *(LONG_CONVOLUTION, IMPLICIT_LONG_CONVOLUTION, S4D, FFT_CONV, LONG_CONV, H3, STU),
]


@dataclass(frozen=True)
class Finding:
    """A module of a known family.

    Args:
        name (`str`): Its name in the model.
        module (`nn.Module`): The module.
        adapter (`Adapter`): Its family.
        refusal (`str`, *optional*): Why it cannot be patched, or `None` if it can be or is patched.
    """

    name: str
    module: nn.Module
    adapter: Adapter
    refusal: str | None = None

    @property
    def patched(self) -> bool:
        return is_patched(self.module)


def register_adapter(adapter: Adapter) -> None:
    """Adds a family; of two that claim the same module the one registered last serves it."""
    _ADAPTERS.insert(0, adapter)


def supported_classes() -> list[str]:
    """Names of all classes that some adapter knows."""
    return sorted(set().union(*(adapter.class_names for adapter in _ADAPTERS)))


def find_adapter(module: nn.Module) -> Adapter | None:
    """The family of a module, by the names of its class and of that class's bases."""
    names = {cls.__name__ for cls in type(module).__mro__}
    return next((a for a in _ADAPTERS if not names.isdisjoint(a.class_names) and a.claims(module)), None)


def survey(model: nn.Module) -> list[Finding]:
    """Finds the modules of known families in a model, and why some of them must be left alone.

    Names are those in the model that `torch.compile` or data parallelism has wrapped.
    """
    findings = []
    for name, module in _unwrap(model).named_modules():
        adapter = find_adapter(module)
        if adapter is not None:
            findings.append(Finding(name, module, adapter, None if is_patched(module) else _refusal(module, adapter)))
    return findings


def _unwrap(model: nn.Module) -> nn.Module:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrap(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return _unwrap(compiled) if isinstance(compiled, nn.Module) else model


def _refusal(module: nn.Module, adapter: Adapter) -> str | None:
    try:
        adapter.check(module)
    except Unsupported as reason:
        return str(reason)
    return disagreement(module, adapter)
