"""The last check of a recognised module: its own code and the patched code agree on a short random input.

Structure cannot tell a fork that changed a formula and kept all names. The module itself is not touched: the patched
code runs on a twin that shares its sub-modules.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .base import Adapter
from .structure import has_hooks
from .swap import make_twin

# Long enough for every gate, tap and direction to matter, short enough to cost nothing.
_LENGTH = 7
# A changed formula is off by the size of the output; 16-bit weights leave a per cent between equal formulas.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 0.1


def disagreement(module: nn.Module, adapter: Adapter) -> str | None:
    """Tells how the outputs differ, or `None` if they agree or the module cannot be run without side effects."""
    if not _can_run(module):
        return None
    weight = next(module.parameters())
    u = torch.randn(adapter.input_shape(module, _LENGTH), generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        expected = _run(type(module), _shallow_copy(module), u)
    except Exception:
        # The original does not run here: 16-bit weights on a CPU, sub-modules on several devices, a missing library.
        return None
    twin = make_twin(module, adapter)
    try:
        actual = _run(type(twin), twin, u)
    except Exception as error:
        return f"the published code fails with its sub-modules: {error}"
    if actual.shape == expected.shape:
        difference = float((actual - expected).norm() / expected.norm())
        # Written so that a difference of NaN, from weights that hold NaN, is no disagreement.
        if not difference > _TOLERANCE.get(weight.dtype, _TOLERANCE_16_BIT):
            return None
        return f"its code computes something else than the published code, off by {difference:.2g} of the output"
    return f"its code returns shape {tuple(expected.shape)} where the published code returns {tuple(actual.shape)}"


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Shares all with `module`, but takes the attributes that some code sets on `self` in a call."""
    copied: nn.Module = object.__new__(type(module))
    vars(copied).update(vars(module))
    return copied


def _can_run(module: nn.Module) -> bool:
    """Whether all weights are plain tensors in place, and no hook would notice the call."""
    tensors = [*module.parameters(), *module.buffers()]
    return (
        any(True for _ in module.parameters())
        and all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta for tensor in tensors)
        and not any(has_hooks(part) or "forward" in vars(part) for part in module.modules())
    )


def _run(cls: Any, module: nn.Module, u: Tensor) -> Tensor:
    devices = [u.device] if u.is_cuda else []
    # The same seed for both, so that active dropout drops the same.
    with torch.no_grad(), torch.autocast(u.device.type, enabled=False), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            # Those of the module's own code are for its own calls.
            warnings.simplefilter("ignore")
            output = cls.forward(module, u)
    return (output[0] if isinstance(output, tuple) else output).double()
