"""`patch_model(filter_length=...)`: which filters can be cut, where the cut is kept, and how much of them it takes.

Filters of remote code are cut after they are generated, by the patched mixer. Those of this package's own models cut
themselves: they have an attribute `truncation`, and fields of the configuration, so that it is saved with the model.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..ops.truncation import Truncation


def cuts_itself(filter_fn: nn.Module) -> bool:
    """Whether a filter module applies a truncation of its own."""
    return "truncation" in filter_fn.__dict__


def truncation_of(filter_fn: Any, patched: Truncation | None) -> Truncation | None:
    """The truncation in effect for a filter of a module that is patched with `patched`."""
    return filter_fn.truncation if cuts_itself(filter_fn) else patched


def check_truncation(name: str, longest: int, filters: list[nn.Module], truncation: Truncation) -> None:
    """Raises `PatchError` unless the filters of the mixer `name`, of `longest` taps, can be cut."""
    if truncation.length > longest:
        raise PatchError(f"{name}: filter_length={truncation.length} exceeds l_max={longest}, all taps")
    if any(cuts_itself(filter_fn) and hasattr(filter_fn, "frequency_mask") for filter_fn in filters):
        raise PatchError(f"the filters of {name or 'the module'} are sparse, and filter_length needs dense ones")


def truncate(filters: list[Any], truncation: Truncation) -> list[tuple[Any, Truncation | None]]:
    """Cuts those filters that cut themselves; returns what [`restore`] needs."""
    own = [(filter_fn, filter_fn.truncation) for filter_fn in filters if cuts_itself(filter_fn)]
    for filter_fn, _ in own:
        filter_fn.truncation = truncation
    return own


def restore(own: list[tuple[Any, Truncation | None]]) -> None:
    """Undoes [`truncate`]."""
    for filter_fn, truncation in own:
        filter_fn.truncation = truncation


def write_configurations(model: nn.Module) -> None:
    """Lets the configurations of native models within `model` say how their filters are cut."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "filter_taper"):
            own: Any = next(filter(cuts_itself, module.modules()), None)
            if own is not None:
                config.filter_length = None if own.truncation is None else own.truncation.length
                config.filter_taper = 0.0 if own.truncation is None else own.truncation.taper


@torch.no_grad()
def energy_cut(filters: list[nn.Module], longest: int, bidirectional: bool, truncation: Truncation) -> Tensor | None:
    """The share of each filter's energy, the sum of its squared taps, that a truncation takes away.

    Returns:
        `torch.Tensor` of shape `(filters,)`: One value from 0 to 1 a filter and direction; None where the weights are
        not at hand.
    """
    shares = []
    for filter_fn in filters:
        if any(tensor.is_meta for tensor in (*filter_fn.parameters(), *filter_fn.buffers())):
            return None
        whole: Any = copy.copy(filter_fn)
        if cuts_itself(whole):
            whole.truncation = None
        for method in ("filter", "filter_rev") if bidirectional else ("filter",):
            taps = getattr(whole, method)(longest)[0].float()
            kept = truncation.apply(taps)
            lost = torch.cat([taps[: truncation.length] - kept, taps[truncation.length :]])
            shares.append(lost.square().sum(0) / taps.square().sum(0).clamp(min=torch.finfo(torch.float32).tiny))
    return torch.cat(shares)
