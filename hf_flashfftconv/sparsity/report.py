"""What sparsity removed from each filter, and what that does to the output of its layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .calibration import ModelInputs, bin_energy, call, evaluating
from .conversion import unwrap
from .filters import dense_taps, filter_spectrum, find_filters, is_sparse, make_dense, make_sparse, mask_taps

# Enough for a stable estimate; a layer's activations at its full length can be gigabytes.
MAX_REPORT_LENGTH = 8192


@dataclass(frozen=True)
class FilterSparsity:
    """
    One sparse filter.

    Args:
        layer (`str`): Name of the filter module.
        bins (`int`): Bins of its spectrum.
        kept_bins (`int`): Bins that are kept.
        kept_energy (`float`): Share of the dense filter's energy in the kept bins.
        cut_energy (`float`): Energy at the negative lags of a causal filter, dropped to keep it causal, as a share of
            the dense filter's energy; 0 for a bidirectional filter.
        filter_error (`float`): Norm of the change of the taps, relative to the dense taps. Its square is
            `1 - kept_energy - cut_energy`.
        output_error (`float`): Norm of the change of the layer's output, relative to the output with this filter dense.
    """

    layer: str
    bins: int
    kept_bins: int
    kept_energy: float
    cut_energy: float
    filter_error: float
    output_error: float


class SparsityReport(list[FilterSparsity]):
    """The sparse filters of a model in order; prints as a table."""

    @property
    def density(self) -> float:
        """Kept bins of all listed filters as a fraction of their bins; 1 without sparse filters."""
        return sum(row.kept_bins for row in self) / sum(row.bins for row in self) if self else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {"density": self.density, "filters": [dataclasses.asdict(row) for row in self]}

    def to_markdown(self) -> str:
        """The report as a Markdown table."""
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [_HEADER, ["---"] * len(_HEADER), *self._cells()])

    def __str__(self) -> str:
        if not self:
            return "no sparse filters"
        table = [_HEADER, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table)

    def _cells(self) -> Iterator[list[str]]:
        for row in self:
            kept = f"{row.kept_bins}/{row.bins} ({row.kept_bins / row.bins:.1%})"
            errors = [f"{row.filter_error:.2e}", f"{row.output_error:.2e}"]
            yield [row.layer, kept, f"{row.kept_energy:.3%}", f"{row.cut_energy:.3%}", *errors]


_HEADER = ["filter", "kept bins", "kept energy", "cut for causality", "filter error", "output error"]


@torch.no_grad()
def sparsity_report(model: nn.Module, inputs: ModelInputs | None = None) -> SparsityReport:
    """
    Reports what was removed from each sparse filter, measured with the model's current weights.

    Args:
        model (`nn.Module`):
            The model; left as it is.
        inputs (`torch.Tensor` or `Mapping[str, Any]`, *optional*):
            One batch for the model, on which the output errors of its layers are measured. By default every layer gets
            one sequence of unit Gaussian noise, of its full length up to 8192.

    Returns:
        [`SparsityReport`]: One row for each sparse filter; empty for a dense model.
    """
    target = unwrap(model)
    filters = {name: module for name, module in find_filters(target).items() if is_sparse(module)}
    with evaluating(target):
        arguments = {} if inputs is None else _layer_arguments(target, filters, inputs)
        return SparsityReport(_measure(target, name, module, arguments) for name, module in filters.items())


def _measure(model: nn.Module, name: str, module: Any, arguments: dict[str, Any]) -> FilterSparsity:
    mask = module.frequency_mask
    forward, reverse = dense_taps(module)
    sparse_forward, sparse_reverse = mask_taps(forward, reverse, mask)
    energy = bin_energy(filter_spectrum(forward, reverse))
    dense_norm = _norm(forward, reverse)
    change = _norm(sparse_forward - forward, None if reverse is None else sparse_reverse - reverse)
    layer = name.rpartition(".")[0]
    return FilterSparsity(
        layer=name,
        bins=mask.bins,
        kept_bins=mask.kept,
        kept_energy=float(energy[mask.as_tensor(energy.device)].sum() / energy.sum()),
        cut_energy=0.0 if reverse is not None else float((_norm(sparse_reverse) / dense_norm).square()),
        filter_error=float(change / dense_norm),
        output_error=_output_error(
            model.get_submodule(layer), module, arguments.get(layer) or _noise(model.get_submodule(layer), forward)
        ),
    )


def _output_error(layer: nn.Module, module: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> float:
    args, kwargs = arguments
    sparse = _first(layer(*args, **kwargs))
    mask = module.frequency_mask
    make_dense(module)
    try:
        dense = _first(layer(*args, **kwargs))
    finally:
        make_sparse(module, mask)
    return float(_norm(sparse - dense) / _norm(dense))


def _layer_arguments(model: nn.Module, filters: dict[str, nn.Module], inputs: ModelInputs) -> dict[str, Any]:
    """The arguments that each layer with a sparse filter gets on the model's inputs."""
    arguments: dict[str, Any] = {}
    hooks = []
    for layer in {name.rpartition(".")[0] for name in filters}:

        def record(module: nn.Module, args: Any, kwargs: Any, layer: str = layer) -> None:
            arguments[layer] = (args, kwargs)

        hooks.append(model.get_submodule(layer).register_forward_pre_hook(record, with_kwargs=True))
    try:
        call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return arguments


def _noise(layer: Any, taps: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator(taps.device).manual_seed(0)
    width = getattr(layer, "d_model", taps.shape[2])
    shape = (1, min(taps.shape[1], MAX_REPORT_LENGTH), width)
    dtype = next(layer.parameters()).dtype
    return (torch.randn(shape, generator=generator, device=taps.device, dtype=dtype),), {}


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _norm(*tensors: torch.Tensor | None) -> torch.Tensor:
    return torch.stack([t.double().square().sum() for t in tensors if t is not None]).sum().sqrt()
