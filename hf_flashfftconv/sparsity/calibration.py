"""What each frequency bin of a filter is worth: its energy, or its effect on the model's output for given inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import SparsityError
from .filters import dense_taps, filter_spectrum, is_bidirectional

ModelInputs: TypeAlias = "torch.Tensor | Mapping[str, Any]"


def bin_energy(spectrum: torch.Tensor) -> torch.Tensor:
    """
    Energy of each rfft bin, its mirror image included, over all channels.

    Args:
        spectrum (`torch.Tensor`): Complex `(1, bins, channels)`.

    Returns:
        `torch.Tensor`: float64 `(bins,)`; its sum is `fft_size` times the energy of the taps (Parseval).
    """
    energy = spectrum.abs().square().sum(dim=(0, 2), dtype=torch.float64)
    energy[1:-1] *= 2
    return energy


@torch.no_grad()
def filter_energies(filters: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Share of every bin in the energy of its own filter: float64 `(bins,)`, summing to 1 for each filter."""
    energies = {name: bin_energy(filter_spectrum(*dense_taps(module))) for name, module in filters.items()}
    return {name: energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny) for name, energy in energies.items()}


def output_energies(
    model: nn.Module, filters: Mapping[str, nn.Module], inputs: ModelInputs, probes: int = 4
) -> dict[str, torch.Tensor]:
    """
    Estimated energy, in the model's output, of what every bin of every filter contributes on given inputs.

    To first order, dropping a bin changes the output by the Jacobian times that part of the filter. The squared norms
    of the Jacobian's columns come from backward passes with random output gradients (Hutchinson's estimator), so one
    pass serves all filters, gates and layers after the filter included, and the scale is common to all filters.

    Args:
        model (`nn.Module`): The model that owns the filters.
        filters (`Mapping[str, nn.Module]`): Dense filter modules by name.
        inputs (`torch.Tensor` or `Mapping[str, Any]`): One batch: the model's first argument, or its keyword arguments.
        probes (`int`, *optional*, defaults to 4): Number of random backward passes.

    Returns:
        `dict[str, torch.Tensor]`: float64 `(bins,)` for each filter.
    """
    with evaluating(model), _perturbable(filters) as perturbations, torch.enable_grad():
        output = main_output(call(model, inputs))
        generator = torch.Generator(output.device).manual_seed(0)
        leaves = [leaf for pair in perturbations.values() for leaf in pair]
        sensitivities: dict[str, Any] = dict.fromkeys(filters, 0)
        for _ in range(probes):
            probe = torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
            gradients = iter(torch.autograd.grad(output, leaves, probe, retain_graph=True, allow_unused=True))
            for name, pair in perturbations.items():
                forward, *reverse = [next(gradients) for _ in pair]
                if forward is None:
                    raise SparsityError(f"{name} has no effect on the output for these calibration inputs")
                spectrum = filter_spectrum(forward, reverse[0] if reverse else None)
                sensitivities[name] = sensitivities[name] + spectrum.abs().square() / probes
    with torch.no_grad():
        return {
            name: bin_energy(filter_spectrum(*dense_taps(module)) * sensitivities[name].sqrt())
            for name, module in filters.items()
        }


def call(model: nn.Module, inputs: ModelInputs) -> Any:
    """Calls a model on a batch given as a tensor or as keyword arguments, moved to the model's device."""
    device = next(model.parameters()).device
    if isinstance(inputs, torch.Tensor):
        return model(inputs.to(device))
    return model(**{key: item.to(device) if isinstance(item, torch.Tensor) else item for key, item in inputs.items()})


def main_output(output: Any) -> torch.Tensor:
    """The tensor that a model's output is about: its logits, its last hidden state, or its first entry."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), torch.Tensor):
            return getattr(output, name)
    return output if isinstance(output, torch.Tensor) else output[0]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _PerturbedFilter:
    """Mixin that adds differentiable zeros to the taps, to receive their gradient."""

    perturbation: tuple[torch.Tensor, ...]

    def filter(self, L: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().filter(L, *args, **kwargs) + self.perturbation[0][:, :L]  # type: ignore[misc]


class _PerturbedBidirectionalFilter(_PerturbedFilter):
    def filter_rev(self, L: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().filter_rev(L, *args, **kwargs) + self.perturbation[1][:, :L]  # type: ignore[misc]


@contextlib.contextmanager
def _perturbable(filters: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[torch.Tensor, ...]]]:
    classes = {name: type(module) for name, module in filters.items()}
    perturbations = {}
    try:
        for name, module in filters.items():
            with torch.no_grad():
                taps = [half for half in dense_taps(module) if half is not None]
            perturbations[name] = tuple(torch.zeros_like(half, requires_grad=True) for half in taps)
            module.__dict__["perturbation"] = perturbations[name]
            mixin = _PerturbedBidirectionalFilter if is_bidirectional(module) else _PerturbedFilter
            module.__class__ = type(f"Perturbed{classes[name].__name__}", (mixin, classes[name]), {})
        yield perturbations
    finally:
        for name, module in filters.items():
            module.__class__ = classes[name]
            module.__dict__.pop("perturbation", None)
