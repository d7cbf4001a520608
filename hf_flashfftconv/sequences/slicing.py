"""How the mixers of a model are switched to work on slices, and back."""

from dataclasses import replace
from typing import Any

from torch import nn

from ..adapters import _unwrap, survey
from ..adapters.base import patched_class
from ..adapters.swap import _rebind
from ..errors import PatchError
from ..patch import patch_model
from .mixers import SLICED, SlicedMixer, Slicing

_PATCHED = {sliced: patched for patched, sliced in SLICED.items()}


def inner_model(model: nn.Module) -> nn.Module:
    """The model that `torch.compile`, data parallelism or PEFT has wrapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, got {type(model).__name__}")
    model = _unwrap(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def patched_mixers(model: nn.Module) -> dict[str, Any]:
    """All long convolutions of a model by name, patched if they were not.

    Raises:
        PatchError: One of them cannot work on slices; the model is left as it was.
    """
    findings = survey(model)
    for finding in findings:
        if finding.refusal is not None:
            raise PatchError(f"{finding.name} cannot work on slices: {finding.refusal}")
        if finding.adapter.mixer not in SLICED:
            raise PatchError(f"{finding.name} cannot work on slices: its family is {finding.adapter.family}")
        if finding.patched:
            _mixer_and_original(finding.name, finding.module)
    if not findings or not all(finding.patched for finding in findings):
        patch_model(model)
    return {finding.name: finding.module for finding in findings}


def set_slicing(mixers: dict[str, Any], **options: Any) -> None:
    """Sets fields of the [`Slicing`] of patched mixers; their classes follow."""
    plans = {name: (module, *_mixer_and_original(name, module)) for name, module in mixers.items()}
    for module, mixer, original in plans.values():
        slicing = replace(slicing_of(module), **options)
        patched = _PATCHED.get(mixer, mixer)
        old, new = type(module), patched_class(SLICED[patched] if slicing.active else patched, original)
        module.__class__ = new
        _rebind(module, old, new)
        if slicing.active:
            module._flashfftconv_slicing = slicing
        else:
            vars(module).pop("_flashfftconv_slicing", None)


def slicing_of(module: nn.Module) -> Slicing:
    """How a patched mixer works on its sequence."""
    return getattr(module, "_flashfftconv_slicing", Slicing())


def sliced_mixers(model: nn.Module) -> dict[str, Any]:
    """The mixers of a model that work on slices."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SlicedMixer)}


def _mixer_and_original(name: str, module: Any) -> tuple[Any, Any]:
    mixer, *rest = type(module).__bases__
    if rest != [module._flashfftconv_original]:
        raise PatchError(
            f"{name} has the class {type(module).__name__}, which was built on top of the patched class; "
            "let it work on slices before that (before fully_shard)"
        )
    return mixer, module._flashfftconv_original
