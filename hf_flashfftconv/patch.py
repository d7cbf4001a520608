"""`patch_model`, the one switch that makes the long convolutions of a model fast, and the way back."""

import logging
from collections import Counter

from torch import nn

from .adapters import Finding, supported_classes, survey
from .adapters.base import PatchedMixer
from .adapters.cache import DEFAULT_CACHE_BYTES, FilterCache
from .adapters.repair import declare_shared_weights, undeclare_shared_weights
from .adapters.swap import check_restorable, configure, is_patched, patch_module, restore_module
from .adapters.truncation import check_truncation, write_configurations
from .errors import PatchError
from .ops.library import BACKENDS
from .ops.truncation import Truncation
from .report import PatchReport, patch_report

__all__ = ["PatchReport", "patch_model", "patch_report", "unpatch_model"]

logger = logging.getLogger(__name__)


def patch_model(
    model: nn.Module,
    *,
    backend: str = "auto",
    repair: bool = True,
    float32_filters: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    filter_length: int | None = None,
    taper: float = 0.0,
) -> nn.Module:
    """Makes the long convolutions of a model run through [`fft_conv`], in place.

    Works on the models of `hf_flashfftconv.models`, on remote code from the Hub and other public code whose classes
    have the published names, and on such models wrapped by `torch.compile`, PEFT, DataParallel or
    DistributedDataParallel. Each module with a long convolution (`HyenaOperator`, `ParallelHyenaFilter`, `S4D` ...)
    that is understood for certain gets a subclass of its own class; what is not understood is left alone, with the
    reason in [`patch_report`]. Parameters, buffers, state dict, hooks and the other modules stay as they are, other
    models too.

    Patch before `torch.compile`, `Trainer` or distributed wrapping where you can: what was compiled is compiled again.

    Patching again changes nothing but the options. Either all modules that can be patched are patched, or the model is
    left as it was.

    Args:
        model (`nn.Module`): The model; on any device, weights on the meta device included.
        backend (`str`, *optional*, defaults to `"auto"`): The backend of [`fft_conv`].
        repair (`bool`, *optional*, defaults to `True`):
            Whether to declare shared parameters to transformers, which otherwise cannot save HyenaDNA's and M2-BERT's
            remote code (`save_pretrained`, `push_to_hub` and `Trainer` checkpoints).
        float32_filters (`bool`, *optional*, defaults to `False`):
            Whether to hold and generate the filters in float32 under autocast and in a 16-bit model, also when it
            becomes one later: patch in float32, then convert with `model.to(torch.bfloat16)`. The patched model is
            then more accurate than the unpatched one, whose filters are off by several per cent in bfloat16.
        cache_bytes (`int`, *optional*, defaults to 1 GiB):
            Bound on the memory for filters, and for weights of projections in the dtype of autocast, that are kept
            between calls in evaluation, under `torch.no_grad()` or `torch.inference_mode()`; 0 makes them in every
            call. They are dropped when weights change; a write into `parameter.data` is noticed at the next
            `model.train()` or `model.eval()`.
        filter_length (`int`, *optional*):
            Cuts the filters to this many taps in each direction, at most the model's longest sequence (`l_max`).
            Sequences may then be of any length, also longer than those that the model was trained with. It changes
            what the model computes: [`patch_report`] tells what share of the filters' energy is cut. A model of
            `hf_flashfftconv.models` keeps the choice in its configuration (`filter_length`, `filter_taper`), so that it
            is saved and loaded; with remote code it is to be given again.
        taper (`float`, *optional*, defaults to 0.0):
            Share of the `filter_length` taps over which a filter falls to zero at its end, along half a cosine.

    Returns:
        `nn.Module`: `model` itself.

    Raises:
        TypeError: `model` is not a module.
        PatchError: The backend is unknown, `cache_bytes` is negative, `filter_length` or `taper` is out of range,
            nothing in the model can be patched, `float32_filters` is asked for while weights are on the meta device, or
            `filter_length` for a model of this package whose filters are sparse.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_model needs a torch.nn.Module, got {type(model).__name__}")
    if backend not in BACKENDS:
        raise PatchError(f"unknown backend {backend!r}; supported: {', '.join(map(repr, BACKENDS))}")
    if cache_bytes < 0:
        raise PatchError(f"cache_bytes must not be negative, got {cache_bytes}")
    truncation = _truncation(filter_length, taper)

    findings = survey(model)
    planned = [finding for finding in findings if finding.refusal is None]
    new = [finding for finding in planned if not finding.patched]
    if not planned:
        raise PatchError(_nothing_to_patch(model, findings))
    if float32_filters:
        _check_present(planned)
    if truncation is not None:
        for finding in planned:
            if finding.adapter.mixer.generate is not PatchedMixer.generate:
                raise PatchError(f"{finding.name}: filter_length is not supported for {finding.adapter.family}")
            filters = finding.adapter.mixer.filter_modules(finding.module)
            check_truncation(finding.name, finding.module.l_max, filters, truncation)

    cache = next((finding.module._flashfftconv.cache for finding in planned if finding.patched), FilterCache())
    committed: list[nn.Module] = []
    try:
        for finding in new:
            patch_module(finding.module, finding.adapter, cache)
            committed.append(finding.module)
        if repair:
            declare_shared_weights(model)
    except BaseException:
        for module in committed:
            restore_module(module)
        undeclare_shared_weights(model)
        raise
    cache.resize(cache_bytes)
    for finding in planned:
        configure(finding.module, backend, float32_filters, truncation)
    write_configurations(model)
    _log(findings)
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Restores a model exactly as it was before [`patch_model`]; a model that was never patched is left as it is.

    Args:
        model (`nn.Module`): The model, wrapped or not.

    Returns:
        `nn.Module`: `model` itself.

    Raises:
        TypeError: `model` is not a module.
        PatchError: Another library has since built its own classes on top of the patched ones (`fully_shard` does).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch_model needs a torch.nn.Module, got {type(model).__name__}")
    patched = [(name, module) for name, module in model.named_modules() if is_patched(module)]
    for name, module in patched:
        check_restorable(module, name)
    for _, module in patched:
        restore_module(module)
    if patched:
        write_configurations(model)
    undeclare_shared_weights(model)
    return model


def _truncation(filter_length: int | None, taper: float) -> Truncation | None:
    if filter_length is None:
        if taper != 0:
            raise PatchError(f"taper={taper} needs a filter_length")
        return None
    try:
        return Truncation(filter_length, taper)
    except ValueError as error:
        raise PatchError(str(error)) from error


def _check_present(findings: list[Finding]) -> None:
    for finding in findings:
        if any(tensor.is_meta for tensor in finding.module.parameters()):
            raise PatchError(f"float32_filters needs the weights, but those of {finding.name} are on the meta device")


def _nothing_to_patch(model: nn.Module, findings: list[Finding]) -> str:
    if findings:
        refusals = "; ".join(f"{f.name or 'the module'} ({type(f.module).__name__}): {f.refusal}" for f in findings)
        return f"no long convolution of this {type(model).__name__} can be patched: {refusals}"
    seen = Counter(type(m).__name__ for m in model.modules() if not type(m).__module__.startswith("torch."))
    classes = ", ".join(f"{count} x {name}" for name, count in seen.most_common(12))
    return (
        f"found no long convolution in this {type(model).__name__}; supported are modules of the classes "
        f"{', '.join(supported_classes())}; seen: {classes or 'only modules of torch'}"
    )


def _log(findings: list[Finding]) -> None:
    left = [finding for finding in findings if finding.refusal is not None]
    logger.info("%d of %d long convolutions are patched", len(findings) - len(left), len(findings))
    for finding in left:
        logger.warning("%s is left alone: %s", finding.name, finding.refusal)
