"""Patched models under torch.compile with CUDA graphs, which is how small models are to be run."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from model_factory import tiny_hyenadna, tiny_m2bert
from patching import relative
from remote_style import HyenaConfig, HyenaDNAForCausalLM, build
from torch import Tensor, nn

from hf_flashfftconv.patch import patch_model

pytestmark = pytest.mark.gpu

MODELS: dict[str, Callable[[], nn.Module]] = {
    "hyenadna": lambda: tiny_hyenadna(n_layer=2),
    "m2bert": lambda: tiny_m2bert(num_hidden_layers=1),
    "remote-hyenadna": lambda: build(HyenaDNAForCausalLM, HyenaConfig(n_layer=2)),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(make: Callable[[], nn.Module], training: bool) -> tuple[nn.Module, nn.Module]:
    """A patched model without dropout, and a copy of it that is compiled."""
    # Filters in 16 bits amplify each rounding that the compiler leaves out.
    eager = patch_model(make().cuda().train(training), float32_filters=True)
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return eager, torch.compile(copy.deepcopy(eager), mode="reduce-overhead", fullgraph=True)


def logits(model: nn.Module, step: int) -> Tensor:
    ids = torch.randint(7, 11, (3, 64), generator=torch.Generator().manual_seed(step)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        return model(ids).logits


@every_model
def test_inference(make: Callable[[], nn.Module]) -> None:
    eager, compiled = pair(make, training=False)
    with torch.no_grad():
        # Warm-up, recording, and replays with other inputs; then with other weights, in place as optimizers write them.
        for step in range(5):
            assert relative(logits(compiled, step), logits(eager, step)) <= 2e-2
        before = logits(compiled, 5).clone()
        for model in (eager, compiled):
            for name, parameter in model.named_parameters():
                if "filter_fn.implicit_filter" in name and name.endswith("weight"):
                    parameter.mul_(1.5)
        assert relative(logits(compiled, 5), logits(eager, 5)) <= 2e-2 < relative(before, logits(eager, 5))


@every_model
def test_training(make: Callable[[], nn.Module]) -> None:
    eager, compiled = pair(make, training=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (eager, compiled)]
    for step in range(5):
        for model, optimizer in zip((eager, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            logits(model, step).float().square().mean().backward()
            optimizer.step()
        for (name, expected), actual in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            assert (expected.grad is None) == (actual.grad is None), name
        gradients = [[p.grad.flatten() for p in m.parameters() if p.grad is not None] for m in (compiled, eager)]
        assert relative(*map(torch.cat, gradients)) <= 5e-2
        # These small models amplify a rounding's difference in their weights a hundredfold.
        with torch.no_grad():
            for expected, actual in zip(eager.parameters(), compiled.parameters(), strict=True):
                actual.copy_(expected)
