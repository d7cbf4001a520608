"""Whole models: unpatched, patched, and patched and compiled, in one run on the device at hand."""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.cache import DEFAULT_CACHE_BYTES
from ..patch import patch_model

MODES = ("inference", "training")
# Passes that are shorter follow each other for so long.
TOGETHER_SECONDS = 0.05
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class ModelResult:
    """One way to run the model.

    Args:
        way (`str`): Which.
        ms (`float`): The median time of a pass, host time included, of passes that follow each other.
        speedup (`float`): Over the unpatched model.
        error (`float`): Relative L2 error of the output against the unpatched model in float32.
        peak_bytes (`int`, *optional*): Device memory at the peak, weights included; `None` on a CPU.
        first_seconds (`float`): Of the first pass, compilation included.
    """

    way: str
    ms: float
    speedup: float
    error: float
    peak_bytes: int | None
    first_seconds: float


@dataclass(frozen=True)
class ModelReport:
    """All results of a run: prints as a table, saves itself as JSON.

    Args:
        environment (`dict`): Device and versions.
        problem (`dict`): What was run.
        results (`list[ModelResult]`): The results, the unpatched model first.
    """

    environment: dict[str, Any]
    problem: dict[str, Any]
    results: list[ModelResult]

    def __str__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in (self.problem | self.environment).items())
        lines = [facts, "", f"{'':<20} {'ms':>10} {'speed-up':>9} {'peak GiB':>9} {'error':>8} {'first pass, s':>14}"]
        for r in self.results:
            peak = "-" if r.peak_bytes is None else f"{r.peak_bytes / 2**30:.2f}"
            numbers = f"{r.ms:>10.2f} {r.speedup:>9.2f} {peak:>9} {r.error:>8.1e} {r.first_seconds:>14.1f}"
            lines.append(f"{r.way:<20} {numbers}")
        return "\n".join(lines)

    def save_json(self, path: str | Path) -> None:
        """Writes everything to a file."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")


def bench_model(
    model: nn.Module,
    *,
    batch: int = 1,
    length: int = 1024,
    mode: str = "inference",
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
    compile_mode: str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    device: str | torch.device | None = None,
    repetitions: int = 20,
) -> ModelReport:
    """Measures a model as it is, patched, and patched and compiled, on random tokens without padding.

    A training pass is forward and backward, without an optimizer. Short passes follow each other as in a loop over
    batches: Python prepares one while the device works on the one before. The model itself is left as it is.

    Args:
        model (`nn.Module`): A transformers model with weights in float32; see [`patch_model`].
        batch (`int`, *optional*, defaults to 1): Sequences.
        length (`int`, *optional*, defaults to 1024): Tokens of a sequence.
        mode (`str`, *optional*, defaults to `"inference"`): Or `"training"`.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Other than float32, it is that of autocast.
        compiled (`bool`, *optional*, defaults to `False`): Whether to run `torch.compile`, too.
        compile_mode (`str`, *optional*):
            The mode of `torch.compile`, which it implies: `"reduce-overhead"` replays CUDA graphs, for models that are
            so small that the GPU waits for Python.
        cache_bytes (`int`, *optional*, defaults to 1 GiB): That of [`patch_model`].
        device (`torch.device`, *optional*): By default the current GPU, or the CPU where there is none.
        repetitions (`int`, *optional*, defaults to 20): Passes that are timed, fewer where they take seconds.

    Returns:
        `ModelReport`: Times, memory and errors.

    Raises:
        ValueError: `mode` or `compile_mode` is unknown, or the model has no vocabulary.
        PatchError: nothing in the model can be patched, or `cache_bytes` is negative.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; supported: {', '.join(map(repr, MODES))}")
    if compile_mode not in (None, *COMPILE_MODES):
        raise ValueError(f"unknown compile_mode {compile_mode!r}; supported: {', '.join(map(repr, COMPILE_MODES))}")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is None:
        raise ValueError(f"{type(model).__name__} has no config.vocab_size to choose tokens from")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = copy.deepcopy(model).to(place).train(mode == "training")
    tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    # A classifier looks at what comes before the first padding.
    if (padding := getattr(model.config, "pad_token_id", None)) is not None:
        tokens[tokens == padding] = (padding + 1) % vocabulary
    tokens = tokens.to(place)
    measure = _Measurement(tokens, mode == "training", dtype, repetitions)
    # In float32, and without the dropout that training may have.
    with torch.no_grad():
        reference = _output(model.eval(), tokens).float().cpu()
    model.train(mode == "training")
    results = [measure(model, model, "unpatched", reference)]
    patch_model(model, cache_bytes=cache_bytes)
    results.append(measure(model, model, "patched", reference))
    if compiled or compile_mode:
        runner = torch.compile(model, mode=compile_mode)
        results.append(measure(runner, model, "patched, compiled", reference))
    results = [replace(result, speedup=results[0].ms / result.ms) for result in results]
    problem = {"model": type(model).__name__, "batch": batch, "length": length, "mode": mode}
    problem |= {"dtype": str(dtype).removeprefix("torch."), "repetitions": repetitions}
    problem |= {"compile mode": compile_mode} if compile_mode else {}
    problem |= {"cache_bytes": cache_bytes} if cache_bytes != DEFAULT_CACHE_BYTES else {}
    return ModelReport(_environment(place), problem, results)


class _Measurement:
    """Runs one model after the other on the same tokens."""

    def __init__(self, tokens: Tensor, training: bool, dtype: torch.dtype, repetitions: int) -> None:
        self.tokens, self.training, self.dtype, self.repetitions = tokens, training, dtype, repetitions
        self.cuda = tokens.is_cuda

    def __call__(self, runner: Any, model: nn.Module, way: str, reference: Tensor) -> ModelResult:
        first_seconds = self._seconds(lambda: self._run(runner))
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        estimate = self._seconds(lambda: self._run(runner))
        peak_bytes = torch.cuda.max_memory_allocated() if self.cuda else None
        # At least three, then as many as fit into ten seconds, and of short ones some at a time.
        count = min(self.repetitions, max(3, int(10 / max(estimate, 1e-6))))
        burst = max(1, int(TOGETHER_SECONDS / max(estimate, 1e-6)))
        times = [self._seconds(lambda: self._run(runner), burst) for _ in range(count)]
        model.zero_grad(set_to_none=True)
        model.eval()
        with torch.no_grad(), self._autocast():
            output = _output(runner, self.tokens).float().cpu()
        model.train(self.training)
        error = float((output - reference).norm() / reference.norm())
        return ModelResult(way, statistics.median(times) * 1e3, 1.0, error, peak_bytes, first_seconds)

    def _run(self, runner: Any) -> None:
        if not self.training:
            with torch.no_grad(), self._autocast():
                _output(runner, self.tokens)
            return
        runner.zero_grad(set_to_none=True)
        with self._autocast():
            loss = _output(runner, self.tokens).float().square().mean()
        loss.backward()

    def _seconds(self, work: Callable[[], None], times: int = 1) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.tokens.device.type, self.dtype)


def _output(runner: Any, tokens: Tensor) -> Tensor:
    output = runner(tokens)
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output[0]


def _environment(device: torch.device) -> dict[str, Any]:
    import transformers

    from .. import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_flashfftconv": __version__,
    }
