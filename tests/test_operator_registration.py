"""fft_conv as PyTorch sees it: operator checks, derivatives, compilation, autocast, checkpointing, dispatch."""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_flashfftconv import fft_conv
from hf_flashfftconv.errors import BackendError
from hf_flashfftconv.ops import library, reference

SEQUENCES = ("u", "pre_gate", "post_gate")
NAMES = ("u", "k", "skip", "pre_gate", "post_gate", "k_rev")


def make(length: int = 6, names: tuple[str, ...] = NAMES, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"k": (3, length + 1), "skip": (3,), "k_rev": (3, 4)} | dict.fromkeys(SEQUENCES, (2, 3, length))
    return {name: torch.randn(shapes[name], dtype=dtype, requires_grad=True) for name in names}


VARIANTS = pytest.mark.parametrize("names", [NAMES, ("u", "k"), ("u", "k", "skip", "pre_gate")], ids=len)


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(names: tuple[str, ...], dtype: torch.dtype) -> None:
    arguments = make(names=names, dtype=dtype)
    tensors = [arguments[name].detach() if name in names else None for name in NAMES]
    # Autograd is outside of the raw operators, so that their inputs require no gradient here.
    torch.library.opcheck(torch.ops.hf_flashfftconv.fft_conv.default, (*tensors, True, "torch"))
    for needs in ([name in names for name in NAMES], [name == "k" for name in NAMES]):
        backward = (torch.randn(2, 3, 6).to(dtype), *tensors, True, "torch", needs)
        torch.library.opcheck(torch.ops.hf_flashfftconv.fft_conv_backward.default, backward)


@VARIANTS
@pytest.mark.parametrize("length", [1, 4])
def test_gradcheck(length: int, names: tuple[str, ...]) -> None:
    arguments = make(length, names, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: fft_conv(**dict(zip(names, x, strict=True))), tuple(arguments.values()))


def test_gradcheck_circular() -> None:
    u, k = make(7, ("u", "k"), torch.float64).values()
    assert torch.autograd.gradcheck(lambda u, k: fft_conv(u, k[:, :5], causal=False), (u, k))


@pytest.mark.parametrize("transform", ["dual", "jvp", "grad"])
def test_other_kinds_of_differentiation_are_refused(transform: str) -> None:
    """Tensors that need no gradient go straight to the operator; these derivatives must not get lost that way."""
    u, k = (x.detach() for x in make(names=("u", "k")).values())
    with pytest.raises((RuntimeError, NotImplementedError), match=r"autograd\.Function"):
        if transform == "dual":
            with forward_ad.dual_level():
                fft_conv(forward_ad.make_dual(u, torch.ones_like(u)), k)
        elif transform == "jvp":
            torch.func.jvp(lambda u: fft_conv(u, k), (u,), (u,))
        else:
            torch.func.grad(lambda u: fft_conv(u, k).sum())(u)


def test_only_gradients_cost_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library._FFTConv, "apply", lambda *_: "recorded")
    arguments = make(dtype=torch.bfloat16)
    assert fft_conv(**arguments) == "recorded"
    constants = {name: x.detach() for name, x in arguments.items()}
    assert isinstance(fft_conv(**constants), Tensor)
    for name in NAMES:
        assert fft_conv(**{**constants, name: arguments[name]}) == "recorded"
    with torch.no_grad():
        assert isinstance(fft_conv(**arguments), Tensor)


@pytest.mark.parametrize("linear", [True, False])
def test_second_derivatives_are_refused(linear: bool) -> None:
    u, k = make(names=("u", "k")).values()
    y = fft_conv(u, k)
    # For the plain sum dy is a constant, yet the gradient of u depends on k.
    (gradient,) = torch.autograd.grad(y.sum() if linear else y.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="fft_conv has no second derivative"):
        (u.sum() + gradient.square().sum()).backward()


def run(function: Callable[..., Tensor], arguments: dict[str, Tensor]) -> list[Tensor]:
    y = function(**arguments)
    return [y, *torch.autograd.grad(y.float().square().sum(), list(arguments.values()))]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@VARIANTS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_breaks_or_recompilation(fresh_dynamo: None, names: tuple[str, ...], dynamic: bool) -> None:
    compiled = torch.compile(fft_conv, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    run(compiled, make(6, names))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 9, 16) if dynamic else (6, 6):
            arguments = make(length, names)
            for actual, expected in zip(run(compiled, arguments), run(fft_conv, arguments), strict=True):
                torch.testing.assert_close(actual, expected)


def test_compiles_under_autocast_and_without_gradients(fresh_dynamo: None) -> None:
    arguments = make()
    compiled = torch.compile(fft_conv, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(**arguments), fft_conv(**arguments))
    with torch.no_grad():
        torch.testing.assert_close(compiled(**arguments), fft_conv(**arguments))


def test_compiled_code_checks_its_arguments(fresh_dynamo: None) -> None:
    compiled = torch.compile(fft_conv, backend="aot_eager")
    with pytest.raises(ValueError, match="k must have shape"):
        compiled(torch.zeros(2, 3, 8), torch.zeros(4, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_sequences_and_leaves_filters(dtype: torch.dtype) -> None:
    arguments = make(100)
    with torch.autocast("cpu", dtype=dtype):
        y = fft_conv(**arguments)
    by_hand = {name: x.to(dtype) if name in SEQUENCES else x for name, x in arguments.items()}
    assert y.dtype == dtype
    assert torch.equal(y, fft_conv(**by_hand))
    for gradient, x in zip(torch.autograd.grad(y.sum(), list(arguments.values())), arguments.values(), strict=True):
        assert gradient.dtype == x.dtype


def test_autocast_unites_dtypes_but_for_float64() -> None:
    arguments = make(names=("u", "k", "pre_gate"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fft_conv(arguments["u"], arguments["k"], pre_gate=arguments["pre_gate"].half()).dtype == torch.bfloat16
        assert fft_conv(arguments["u"].double(), arguments["k"]).dtype == torch.float64
        with pytest.raises(TypeError, match="pre_gate must have the dtype of u"):
            fft_conv(arguments["u"].double(), arguments["k"], pre_gate=arguments["pre_gate"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    arguments = make()

    def checkpointed(**x: Tensor) -> Tensor:
        return checkpoint(
            lambda *tensors: fft_conv(**dict(zip(x, tensors, strict=True))), *x.values(), use_reentrant=use_reentrant
        )

    def backward(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in arguments.items()}
        function(**leaves).square().sum().backward()
        return [x.grad for x in leaves.values()]

    for actual, expected in zip(backward(checkpointed), backward(fft_conv), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_saved_but_the_inputs(dtype: torch.dtype) -> None:
    arguments = make(dtype=dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        fft_conv(**arguments)
    # In full precision also the output before its gate.
    assert {x.data_ptr() for x in arguments.values()} <= set(saved)
    assert len(set(saved)) == len(arguments) + (dtype == torch.float32)


def test_meta_tensors() -> None:
    y = fft_conv(torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16), torch.empty(3, 8, device="meta"))
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 8), torch.bfloat16)


class Kernels:
    """Stands for `ops.cuda`: serves lengths up to `limit` and records its calls."""

    def __init__(self, limit: int) -> None:
        self.limit, self.calls = limit, []

    def unsupported(self, u: Tensor, k: Tensor, k_rev: Tensor | None, causal: bool, backward: bool) -> str | None:
        return None if u.shape[-1] <= self.limit else f"length {u.shape[-1]} is above {self.limit}"

    def forward(self, *arguments: object) -> Tensor:
        self.calls.append("forward")
        return reference.forward(*arguments[:7])

    def backward(self, *arguments: object) -> reference.Gradients:
        self.calls.append("backward")
        return reference.backward(*arguments)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    kernels = Kernels(limit=8)
    monkeypatch.setattr(library, "cuda", kernels)
    monkeypatch.setattr(library, "cuda_gradients", kernels)
    monkeypatch.setattr(library, "_reasons_told", set())
    return kernels


@pytest.mark.parametrize("backend, calls", [("auto", 2), ("cuda", 2), ("torch", 0)])
def test_backends(kernels: Kernels, backend: str, calls: int) -> None:
    arguments = make(8)
    results = run(lambda **x: fft_conv(**x, backend=backend), arguments)
    assert kernels.calls == ["forward", "backward"][:calls]
    for actual, expected in zip(results, run(lambda **x: fft_conv(**x, backend="torch"), arguments), strict=True):
        assert torch.equal(actual, expected)


def test_a_backend_asked_for_by_name_serves_or_raises(kernels: Kernels) -> None:
    u, k = make(9, ("u", "k")).values()
    with pytest.raises(BackendError, match='backend "cuda" cannot serve this call: length 9 is above 8'):
        fft_conv(u, k, backend="cuda")
    assert kernels.calls == []


def test_auto_falls_back_and_says_so_once_a_reason(kernels: Kernels, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_flashfftconv"):
        for length in (9, 9, 10, 9):
            u, k = make(length, ("u", "k")).values()
            assert torch.equal(fft_conv(u, k), fft_conv(u, k, backend="torch"))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "length 9 is above 8" in caplog.text and "length 10 is above 8" in caplog.text
    assert kernels.calls == []


def test_a_fallback_on_a_gpu_is_a_warning(kernels: Kernels, caplog: pytest.LogCaptureFixture) -> None:
    on_gpu = SimpleNamespace(shape=(1, 1, 9), is_cuda=True)
    assert not library.use_kernels(on_gpu, None, None, True, "auto")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_empty_inputs_need_no_kernel(kernels: Kernels) -> None:
    u, k = torch.zeros(0, 3, 8, requires_grad=True), torch.zeros(3, 8)
    fft_conv(u, k, backend="cuda").sum().backward()
    assert kernels.calls == []


def test_without_a_gpu_the_cuda_backend_says_why() -> None:
    u, k = make(8, ("u", "k")).values()
    with pytest.raises(BackendError, match=r'backend "cuda" cannot serve this call: .+'):
        fft_conv(u, k, backend="cuda")


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize(
    "watched",
    [nullcontext, _Watching, torch.autograd.profiler.profile, pytest.MonkeyPatch.context],
    ids=["nobody", "mode", "profiler", "unknown"],
)
def test_the_operator_is_called_where_somebody_sees_it(watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_PLAIN", {SimpleNamespace})
    on_gpu, elsewhere = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    with watched() as patch:
        if isinstance(patch, pytest.MonkeyPatch):
            patch.delattr(torch._C, "_len_torch_dispatch_stack")
        expected = "implementation" if watched is nullcontext else "operator"
        assert library.directly("operator", "implementation", on_gpu, None) == expected
        assert library.directly("operator", "implementation", on_gpu, elsewhere) == "operator"
        assert library.directly("operator", "implementation", torch.zeros(1)) == "operator"


def test_transformed_and_traced_functions_see_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_PLAIN", {SimpleNamespace})
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(library.directly("operator", "implementation", SimpleNamespace(is_cuda=True)))
        return x

    torch.func.vmap(function)(torch.zeros(3))
    torch.jit.trace(function, torch.zeros(3), check_trace=False)
    assert seen == ["operator", "operator"]
