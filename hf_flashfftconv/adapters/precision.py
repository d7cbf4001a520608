"""Filters in float32 inside of a 16-bit model.

In bfloat16 the times of a long filter take a few hundred distinct values and sines amplify the rounding of the weights:
the filter is off by several per cent. Float32 filters come without loss from a float32 model that is converted after
patching. Of a model that is in 16 bits already the tables of positions and decays can be restored, but not the weights.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NARROW = (torch.bfloat16, torch.float16)


@dataclass
class WidenedFilter:
    """What the tensors of a filter module were: their dtypes, and the tables that were replaced by exact ones."""

    dtypes: dict[str, torch.dtype]
    tables: dict[str, Tensor]


def widen(filter_fn: nn.Module) -> WidenedFilter:
    """Turns the 16-bit tensors of a filter module into float32, in place.

    A table that is its formula, rounded, gets the values of the formula: nobody has trained it.
    """
    widened = WidenedFilter({}, {})
    for name, tensor in _named_tensors(filter_fn):
        if tensor.dtype in _NARROW:
            widened.dtypes[name] = tensor.dtype
            exact = _exact_table(name, tensor)
            if exact is not None:
                widened.tables[name] = tensor.data
            _replace(tensor, torch.float32, exact)
    return widened


def narrow(filter_fn: nn.Module, widened: WidenedFilter) -> None:
    """Undoes [`widen`]; weights that were trained since are rounded."""
    for name, tensor in _named_tensors(filter_fn):
        if name in widened.dtypes:
            _replace(tensor, widened.dtypes[name], widened.tables.get(name))


def keeping_float32(convert: Callable[[Tensor], Tensor], filters: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """`convert`, a conversion of tensors as `nn.Module.to` makes them, without that of `filters` to 16 bits."""
    tensors = [tensor for filter_fn in filters for _, tensor in _named_tensors(filter_fn)]
    kept = {id(tensor) for tensor in tensors} | {id(tensor.grad) for tensor in tensors}

    def convert_or_keep(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        return tensor.to(converted.device) if id(tensor) in kept and converted.dtype in _NARROW else converted

    return convert_or_keep


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # Of a mixer that holds its filter itself, what makes the filter.
    own = getattr(module, "own_filter", ())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not own or name in own:
            yield name, tensor


def _replace(tensor: Tensor, dtype: torch.dtype, values: Tensor | None) -> None:
    # Through `.data`: optimizers and ties hold the parameter itself.
    tensor.data = tensor.data.to(dtype) if values is None else values.to(tensor.device)
    if tensor.grad is not None:
        tensor.grad.data = tensor.grad.data.to(dtype)


def _exact_table(name: str, rounded: Tensor) -> Tensor | None:
    """The table of this name and size as the published code computes it, if `rounded` is that table rounded."""
    sizes = rounded.shape[1:]
    if name == "pos_emb.t":
        exact = _linspace(0, 1, sizes[0])[:, None]
    elif name == "pos_emb.z":
        bands = (sizes[1] - 1) // 2
        position = _linspace(0, sizes[0] - 1, sizes[0])[:, None]
        angle = _linspace(1e-4, bands - 1, bands) * (2 * math.pi * position / sizes[0])
        exact = torch.cat([_linspace(0, 1, sizes[0])[:, None], angle.cos(), -angle.sin()], dim=-1)
    elif name == "modulation.deltas":
        exact = _linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, sizes[1])[None]
    else:
        return None
    exact = exact[None].to(rounded.device)
    # Half of the last bit is the rounding; the rest is for another order of operations in the original.
    close = exact.shape == rounded.shape and torch.allclose(
        exact, rounded.detach().float(), rtol=0.51 * torch.finfo(rounded.dtype).eps, atol=1e-6
    )
    return exact if close else None


def _linspace(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float32)
