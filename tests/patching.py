"""How the tests compare a patched model with the unpatched one."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_flashfftconv.patch import patch_model

# fp32, relative L2: the bound on logits and gradients of a patched model.
TOLERANCE = 1e-5

Call = Callable[[nn.Module], Tensor]


def relative(value: Tensor, reference: Tensor) -> float:
    """Relative L2 distance in float64; absolute where the reference is zero."""
    value, reference = value.detach().double(), reference.detach().double()
    distance, norm = (value - reference).norm(), reference.norm()
    return float(distance / norm if norm > 0 else distance)


def output_and_gradients(model: nn.Module, call: Call) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output of `call` with a fixed seed, and the gradients of a fixed weighted sum of it."""
    model.zero_grad()
    torch.manual_seed(0)
    y = call(model)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return y.detach(), gradients


def assert_equal_models(patched: nn.Module, original: nn.Module, call: Call, tolerance: float = TOLERANCE) -> None:
    """Same output and the same gradients of all parameters, each within `tolerance`."""
    y, gradients = output_and_gradients(patched, call)
    expected, expected_gradients = output_and_gradients(original, call)
    assert y.dtype == expected.dtype
    assert relative(y, expected) <= tolerance
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        reference = expected_gradients[name]
        assert (gradient is None) == (reference is None), name
        if gradient is not None:
            assert relative(gradient, reference) <= tolerance, name


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def assert_patched_mixer_agrees(mixer: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Outputs and gradients, while training and in evaluation, with a cold and a warm filter cache."""
    patched = patch_model(copy.deepcopy(mixer))
    assert isinstance(patched, type(mixer)) and type(patched) is not type(mixer)
    assert list(patched.state_dict()) == list(mixer.state_dict())
    for u in inputs:
        for training in (True, False):
            mixer.train(training)
            patched.train(training)
            assert_equal_models(patched, mixer, lambda m, u=u: first(m(u)))
            with torch.no_grad():
                for _ in range(2):
                    torch.manual_seed(1)
                    expected = mixer(u)
                    torch.manual_seed(1)
                    output = patched(u)
                    assert type(output) is type(expected)
                    assert relative(first(output), first(expected)) <= TOLERANCE


def snapshot(model: nn.Module) -> list[tuple]:
    """Everything that unpatching must restore: classes, attributes, and the bits of the state dict."""
    attributes = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    hooks = [(name, len(module._state_dict_hooks)) for name, module in model.named_modules()]
    state = [(name, tensor.dtype, copy.deepcopy(tensor.tolist())) for name, tensor in model.state_dict().items()]
    return [attributes, hooks, state]
