"""`patch_report`: what patching has replaced in a model, or would replace, and why the rest is left alone."""

import html
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from .adapters import Finding, survey
from .adapters.base import Usage
from .adapters.truncation import energy_cut
from .errors import BackendError
from .ops import blocks, plan
from .ops.library import use_kernels
from .ops.reference import linear_fft_length
from .ops.truncation import kept_taps


@dataclass(frozen=True)
class ModuleReport:
    """One long-convolution module of a model.

    Args:
        name (`str`): Its name in the model.
        original_class (`str`): The class that it has when it is not patched.
        family (`str`): The family that it was recognised as.
        status (`str`): `"replaced"`, `"not patched"` (`patch_model` would replace it) or `"left alone"`.
        backend (`str`, *optional*): The backend that serves it at this length, dtype and device.
        length (`int`, *optional*): Sequence length of the last call, or the longest one before any call.
        fft_size (`int`, *optional*): Length of the transform that this backend uses.
        dtype (`str`, *optional*): Of the input of the convolution.
        filter_length (`int`, *optional*): Taps that are kept of each filter, where they are cut.
        energy_cut (`float`, *optional*): Share of the filters' energy (squared taps) that the cut takes away: the mean
            over all filters of the module, generated at full length to tell.
        energy_cut_worst (`float`, *optional*): The same of the filter that loses most.
        reason (`str`): Why it is left alone, or why its calls run the original code.
    """

    name: str
    original_class: str
    family: str
    status: str
    backend: str | None = None
    length: int | None = None
    fft_size: int | None = None
    dtype: str | None = None
    filter_length: int | None = None
    energy_cut: float | None = None
    energy_cut_worst: float | None = None
    reason: str = ""


_COLUMNS = tuple(field.name for field in fields(ModuleReport))


@dataclass(frozen=True)
class PatchReport:
    """What [`patch_report`] found; prints as a table, also in notebooks.

    Args:
        rows (`tuple[ModuleReport, ...]`): One for each module, in the order of the model.
    """

    rows: tuple[ModuleReport, ...]

    @property
    def replaced(self) -> int:
        """Number of modules that are patched now."""
        return sum(row.status == "replaced" for row in self.rows)

    def to_dict(self) -> list[dict[str, str | int | float | None]]:
        """The rows as dictionaries of JSON types."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        table = [_COLUMNS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        return "\n".join([*lines, self._summary()])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{self._summary()}</p>"

    def _summary(self) -> str:
        return f"{self.replaced} of {len(self.rows)} long convolutions replaced"


def _cells(row: ModuleReport) -> list[str]:
    return [_cell(value) for value in asdict(row).values()]


def _cell(value: str | int | float | None) -> str:
    return "-" if value in (None, "") else f"{value:.2g}" if isinstance(value, float) else str(value)


def patch_report(model: nn.Module) -> PatchReport:
    """Tells for each long convolution of a model whether it is patched, how it runs, or why it is left alone.

    Args:
        model (`nn.Module`): A model, patched or not.

    Returns:
        `PatchReport`: No rows if the model has no module of a known family.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_report needs a torch.nn.Module, got {type(model).__name__}")
    return PatchReport(tuple(_row(finding) for finding in survey(model)))


def _row(finding: Finding) -> ModuleReport:
    module, family = finding.module, finding.adapter.family
    if finding.refusal is not None:
        return ModuleReport(finding.name, type(module).__name__, family, "left alone", reason=finding.refusal)
    if not finding.patched:
        return ModuleReport(finding.name, type(module).__name__, family, "not patched")
    state = module._flashfftconv
    usage = state.last or _longest(module)
    backend, fft_size = (None, None) if usage is None else _plan(usage, state.backend)
    truncation, cut = module.truncation, None
    if truncation is not None:
        bidirectional = getattr(module, "bidirectional", False)
        cut = energy_cut(module.filter_modules(), module.l_max, bidirectional, truncation)
    return ModuleReport(
        finding.name,
        type(module)._flashfftconv_original.__name__,
        family,
        "replaced",
        backend=backend,
        length=None if usage is None else usage.length,
        fft_size=fft_size,
        dtype=None if usage is None else str(usage.dtype).removeprefix("torch."),
        filter_length=None if truncation is None else truncation.length,
        energy_cut=None if cut is None else cut.mean().item(),
        energy_cut_worst=None if cut is None else cut.max().item(),
        reason=state.bypass if module.covered() else "calls run the original code: there are hooks on the filter",
    )


def _longest(module: Any) -> Usage | None:
    """The longest call there can be of a filter that is made for one."""
    length = getattr(module, "l_max", None)
    if length is None:
        return None
    weight = next(module.parameters())
    taps = kept_taps(length, module.truncation)
    reverse_taps = min(taps, length - 1) if getattr(module, "bidirectional", False) else 0
    return Usage(module.d_model, length, taps, reverse_taps, weight.dtype, weight.device)


def _plan(usage: Usage, backend: str) -> tuple[str, int | None]:
    """The backend of such a call, and the length of its transform."""
    # Views of one element: shapes, dtype and device of a call without its memory.
    one = torch.empty((), dtype=torch.float32, device=usage.device)
    u = one.to(usage.dtype).expand(1, usage.channels, usage.length)
    k = one.expand(usage.channels, usage.taps)
    k_rev = one.expand(usage.channels, usage.reverse_taps) if usage.reverse_taps else None
    try:
        if not use_kernels(u, k, k_rev, True, backend):
            taps = min(usage.taps, usage.length)
            windows = blocks.choose(usage.length, taps, usage.reverse_taps, True)
            whole = linear_fft_length(usage.length, taps, usage.reverse_taps)
            return "torch", whole if windows is None else windows.fft_size
    except BackendError as error:
        return f"none: {error}", None
    chosen = plan.choose(usage.length, usage.taps, usage.reverse_taps, True)
    return "cuda", chosen.fft_size if isinstance(chosen, plan.Plan) else None
