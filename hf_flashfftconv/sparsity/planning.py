"""Which mask goes on which filter of a model: planned and checked as a whole, then put on in one step."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import nn

from ..errors import SparsityError
from .calibration import ModelInputs, filter_energies, output_energies
from .filters import check_mask, find_filters, make_dense, make_sparse
from .pattern import FrequencyMask, select_masks

Pattern: TypeAlias = "int | float | FrequencyMask | Mapping[str, FrequencyMask]"


def plan_masks(
    model: nn.Module,
    pattern: Pattern,
    *,
    by: str = "bins",
    layers: Sequence[str] | None = None,
    block: int | None = None,
    calibration: ModelInputs | None = None,
) -> dict[str, FrequencyMask]:
    """
    Chooses a mask for each selected filter without changing the model; arguments as in [`sparsify_model`].

    Returns:
        `dict[str, FrequencyMask]`: Masks by the name of the filter module.
    """
    filters = find_filters(model)
    if not filters:
        raise SparsityError(
            f"{type(model).__name__} has no filters to sparsify; supported are modules of a class HyenaFilter, "
            "as in Hyena, HyenaDNA and M2-BERT"
        )
    chosen = _select(filters, list(pattern) if isinstance(pattern, Mapping) else layers)
    if isinstance(pattern, Mapping):
        return {name: pattern[name] for name in chosen}
    if isinstance(pattern, FrequencyMask):
        return dict.fromkeys(chosen, pattern)
    energies = filter_energies(chosen) if calibration is None else output_energies(model, chosen, calibration)
    return select_masks(energies, pattern, by=by, block=block)


def apply_masks(model: nn.Module, masks: Mapping[str, FrequencyMask]) -> None:
    """Puts masks on the dense filters of these names: on all of them, or after an error on none."""
    filters = find_filters(model)
    for name, mask in masks.items():
        if name not in filters:
            raise SparsityError(f"the model has no filter {name!r}; its filters are {', '.join(filters) or 'none'}")
        check_mask(name, filters[name], mask)
    done: list[nn.Module] = []
    try:
        for name, mask in masks.items():
            make_sparse(filters[name], mask)
            done.append(filters[name])
    except BaseException:
        for module in done:
            make_dense(module)
        raise


def _select(filters: dict[str, nn.Module], patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    if patterns is None:
        return filters
    if isinstance(patterns, str) or not patterns:
        raise SparsityError(f"layers must be a list of at least one filter name or pattern, got {patterns!r}")
    for pattern in patterns:
        if not fnmatch.filter(filters, pattern):
            raise SparsityError(f"no filter matches {pattern!r}; the model's filters are {', '.join(filters)}")
    return {name: filters[name] for name in filters if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
