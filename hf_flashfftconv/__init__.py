"""FFT convolutions as matrix products for the long-convolution models of the Hugging Face Hub.

Importing this package registers its models and its sparse checkpoint format with the Auto classes of transformers. It
touches no GPU, no network and no file; what the names below need is imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .functional import fft_conv
    from .hub import push_to_hub, save_pretrained
    from .nn import FlashFFTConv
    from .patch import patch_model, patch_report, unpatch_model
    from .sequences import shard_sequence
    from .sparsity import densify_model, sparsify_model

__version__ = "0.1.0"

__all__ = [
    "FlashFFTConv",
    "densify_model",
    "fft_conv",
    "patch_model",
    "patch_report",
    "push_to_hub",
    "save_pretrained",
    "shard_sequence",
    "sparsify_model",
    "unpatch_model",
]

_HOMES = {
    "fft_conv": "functional",
    "FlashFFTConv": "nn",
    "patch_model": "patch",
    "unpatch_model": "patch",
    "patch_report": "patch",
    "shard_sequence": "sequences",
    "sparsify_model": "sparsity",
    "densify_model": "sparsity",
    "push_to_hub": "hub",
    "save_pretrained": "hub",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOMES.keys())


def _register() -> None:
    """Make the Auto classes of transformers know this package; calling it again changes nothing."""
    from . import models
    from .sparsity import quantizer

    models.register()
    quantizer.register()


_register()
