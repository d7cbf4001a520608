"""Exceptions raised by hf_flashfftconv; each is also the built-in exception that callers would expect."""


class FlashFFTConvError(Exception):
    """Base class of all errors raised by this package."""


class BackendError(FlashFFTConvError, RuntimeError):
    """A backend that was asked for by name cannot serve the call, or a kernel launch failed."""


class PatchError(FlashFFTConvError, ValueError):
    """A model cannot be patched or unpatched as requested; the model is left as it was."""


class SparsityError(FlashFFTConvError, ValueError):
    """A sparsity pattern is impossible or does not fit the model; the model is left as it was."""


class CheckpointError(FlashFFTConvError, ValueError):
    """A checkpoint is truncated, foreign, or inconsistent with its configuration."""
