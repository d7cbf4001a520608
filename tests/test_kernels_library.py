"""The `kernels` library: its contract for layers, the folder of a kernel repository, and `use_kernels=True`."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MethodType, ModuleType

import pytest
import torch
from model_factory import dna_ids, tiny_hyenadna, tiny_m2bert
from torch import nn
from transformers import PreTrainedModel

from hf_flashfftconv import kernel_layers, patch_model
from hf_flashfftconv.kernel_repository import _is_not_patched, build_kernel_repository, layer_name
from hf_flashfftconv.models.hyena import HyenaOperator
from hf_flashfftconv.models.monarch import MonarchMixerSequenceMixing
from hf_flashfftconv.ops import extension

ROOT = Path(__file__).resolve().parent.parent
CLASSES = (HyenaOperator, MonarchMixerSequenceMixing)


def models() -> dict[str, PreTrainedModel]:
    return {
        "HyenaDNA": tiny_hyenadna(),
        "M2-BERT": tiny_m2bert(),
        "causal M2-BERT": tiny_m2bert(bidirectional=False, residual_long_conv=False),
        "M2-BERT as trained": tiny_m2bert(hyena_training_additions=True),
    }


def bind(model: nn.Module, layers: ModuleType) -> int:
    """Replaces forward passes as `kernelize` does; returns how many."""
    count = 0
    for module in model.modules():
        if type(module) in CLASSES:
            module.forward = MethodType(getattr(layers, type(module).__name__).forward, module)
            count += 1
    return count


def logits_and_gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    logits = model(dna_ids()).logits
    weights = [x for x in model.parameters() if x.requires_grad]
    return [logits.detach(), *torch.autograd.grad(logits.square().mean(), weights, allow_unused=True)]


def check_same(actual: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x - y).norm() <= 1e-5 * y.norm().clamp(min=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
def test_layers_keep_the_contract(cls: type[nn.Module]) -> None:
    layer = getattr(kernel_layers, cls.__name__)
    assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
    members = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert members == {"can_torch_compile"}
    parameters = inspect.signature(layer.forward).parameters, inspect.signature(cls.forward).parameters
    assert [x.kind for x in parameters[0].values()] == [x.kind for x in parameters[1].values()]


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("training", [False, True])
def test_layers_compute_what_the_models_compute(name: str, training: bool) -> None:
    model = models()[name].train(training)
    expected = logits_and_gradients(model)
    assert bind(model, kernel_layers) == model.config.num_hidden_layers
    check_same(logits_and_gradients(model), expected)


def test_layers_compile() -> None:
    model = tiny_hyenadna()
    expected = model(dna_ids()).logits
    bind(model, kernel_layers)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(dna_ids()).logits, expected)


def test_dropout_acts_before_the_convolution() -> None:
    model = tiny_hyenadna().train()
    for module in model.modules():
        if type(module) is HyenaOperator:
            module.dropout.p = 0.5
    torch.manual_seed(1)
    expected = model(dna_ids()).logits
    bind(model, kernel_layers)
    torch.manual_seed(1)
    torch.testing.assert_close(model(dna_ids()).logits, expected)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of the CUDA library."""
    path = tmp_path / "library.so"
    path.write_bytes(b"a library")
    monkeypatch.setattr(extension, "PATH", path)
    return path


@pytest.fixture
def imported(tmp_path: Path) -> Iterator[ModuleType]:
    """The variant for a CPU, imported under its identifier as `kernels` does."""
    folder = build_kernel_repository(tmp_path) / "torch-cpu"
    # The same build cannot be imported twice, and `kernels` imports it in another test.
    identifier = json.loads((folder / "metadata.json").read_text())["id"] + "_alone"
    spec = importlib.util.spec_from_file_location(identifier, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[identifier] = module
    spec.loader.exec_module(module)
    yield module
    for name in [x for x in sys.modules if x.partition(".")[0] == identifier]:
        del sys.modules[name]


def test_a_repository_stands_on_its_own_beside_the_package(imported: ModuleType) -> None:
    sources = {Path(module.__file__) for name, module in sys.modules.items() if name.startswith(imported.__name__)}
    assert len(sources) > 5 and not any(path.is_relative_to(ROOT) for path in sources)
    model = tiny_hyenadna()
    expected = logits_and_gradients(model)
    bind(model, imported.layers)
    with torch.profiler.profile() as profile:
        actual = logits_and_gradients(model)
    check_same(actual, expected)
    assert f"{imported.__name__}::fft_conv" in {event.key for event in profile.key_averages()}


def test_variants(tmp_path: Path, library: Path) -> None:
    build = build_kernel_repository(tmp_path, cuda="13.0")
    (with_library,) = (path for path in build.iterdir() if path.name != "torch-cpu")
    assert with_library.name.startswith("torch-stable-abi210-cu130-")
    assert (with_library / "lib" / library.name).read_bytes() == b"a library"
    assert json.loads((with_library / "metadata.json").read_text())["backend"] == {"type": "cuda"}
    assert {path.name for path in build_kernel_repository(tmp_path / "plain").iterdir()} == {"torch-cpu", "torch-cuda"}
    with pytest.raises(ValueError, match=r"cuda must be a version such as '13\.0', got 'thirteen'"):
        build_kernel_repository(tmp_path, cuda="thirteen")
    library.unlink()
    with pytest.raises(ValueError, match="there is no CUDA library to add"):
        build_kernel_repository(tmp_path, cuda="13.0")


def test_patched_modules_are_left_alone() -> None:
    model = tiny_hyenadna()
    operators = [module for module in model.modules() if type(module) is HyenaOperator]
    assert operators and all(map(_is_not_patched, operators))
    patch_model(model)
    assert not any(map(_is_not_patched, operators))


def test_a_local_repository_with_the_library(tmp_path: Path) -> None:
    kernels = pytest.importorskip("kernels")
    build = build_kernel_repository(tmp_path)
    model = tiny_hyenadna()
    expected = logits_and_gradients(model)
    # A class of its own, so that the model's stays as it is.
    named = type("Named", (HyenaOperator,), {"kernel_layer_name": layer_name(HyenaOperator)})
    operators = [module for module in model.modules() if type(module) is HyenaOperator]
    for module in operators:
        module.__class__ = named
    repository = kernels.LocalLayerRepository(build, layer_name="HyenaOperator")
    with kernels.use_kernel_mapping({layer_name(HyenaOperator): {"cpu": repository}}):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    assert all(module.forward.__func__.__module__.startswith("_hf_flashfftconv_cpu_") for module in operators)
    check_same(logits_and_gradients(model), expected)


USE_KERNELS = """
import sys, torch
from hf_flashfftconv import patch_model
from hf_flashfftconv.models import HyenaDNAForCausalLM
plain = HyenaDNAForCausalLM.from_pretrained(sys.argv[1])
model = HyenaDNAForCausalLM.from_pretrained(sys.argv[1], use_kernels=True)
operators = [x for x in model.modules() if type(x).__name__ == "HyenaOperator"]
def check(module):
    if operators and not all(x.forward.__func__.__module__ == module for x in operators):
        raise SystemExit([x.forward.__func__.__module__ for x in operators])
check("hf_flashfftconv.kernel_layers")
ids = torch.randint(7, 11, (2, 30))
torch.testing.assert_close(model(ids).logits, plain(ids).logits)
model.train()
check("hf_flashfftconv.kernel_layers")
operators = [x for x in plain.modules() if type(x).__name__ == "HyenaOperator"]
patch_model(plain)
plain.set_use_kernels(True)
check("hf_flashfftconv.adapters.hyena")
raise SystemExit(0 if len(operators) == 2 else "no operators")
"""


def test_use_kernels(tmp_path: Path) -> None:
    """In a process of its own, where `kernels` passes for a version that this transformers accepts."""
    kernels = pytest.importorskip("kernels")
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    tiny_hyenadna().save_pretrained(tmp_path / "model")
    metadata = tmp_path / "path" / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (metadata.parent / "RECORD").write_text("kernels/__init__.py,,\n")
    paths = [metadata.parent.parent, ROOT, Path(kernels.__file__).parent.parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", USE_KERNELS, str(tmp_path / "model")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
