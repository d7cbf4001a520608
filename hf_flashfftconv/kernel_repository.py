"""The `kernels` library's way to this package: `use_kernels=True` in transformers, and repositories of the kernel Hub.

With a version of `kernels` that transformers accepts, `from_pretrained(..., use_kernels=True)` on a model of this
package computes its mixers with `fft_conv`. [`build_kernel_repository`] writes the same layers, with all they need, as
a folder that `LocalLayerRepository` and, once uploaded, `LayerRepository` load where this package is not installed.
"""

import hashlib
import json
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from . import kernel_layers
from .ops import extension

NAME = "hf-flashfftconv"
# The oldest torch that the package supports.
_TORCH = "torch-stable-abi210"
_PARTS = ("errors.py", "functional.py", "kernel_layers.py", "ops")
_INIT = '''"""Layers with long FFT convolutions, built from hf_flashfftconv."""

from . import kernel_layers as layers
from .functional import fft_conv

__all__ = ["fft_conv", "layers"]
'''


class _Installed:
    """A repository, in the sense of `kernels`, that is this very package."""

    def __init__(self, layer: type[nn.Module]) -> None:
        self.layer = layer

    def load(self) -> type[nn.Module]:
        return self.layer

    def __str__(self) -> str:
        return f"hf_flashfftconv (layer `{self.layer.__name__}`)"


def offer_kernels(*classes: type[nn.Module]) -> None:
    """Lets `use_kernels=True` replace the forward pass of these classes by that of the layers with their names.

    Does nothing where `kernels` is missing or its version is not one that transformers accepts: then transformers
    itself refuses `use_kernels=True`. Modules that [`patch_model`] has patched stay as they are.
    """
    from transformers.utils.import_utils import is_kernels_available

    if not is_kernels_available():
        return
    from kernels import Mode, register_kernel_mapping, replace_kernel_forward_from_hub

    for cls in classes:
        name = layer_name(cls)
        replace_kernel_forward_from_hub(cls, name, condition=_is_not_patched)
        modes = {Mode.TRAINING | Mode.TORCH_COMPILE: _Installed(getattr(kernel_layers, cls.__name__))}
        register_kernel_mapping({name: {"cuda": modes, "cpu": modes}})


def layer_name(cls: type[nn.Module]) -> str:
    """The name of a class in kernel mappings, which other packages share."""
    return f"hf_flashfftconv_{cls.__name__}"


def _is_not_patched(module: nn.Module) -> bool:
    return "_flashfftconv" not in vars(module)


def build_kernel_repository(folder: str | Path, cuda: str | None = None) -> Path:
    """Writes the layers of this package as a kernel repository.

    Args:
        folder (`str` or `Path`): Where to; it gets a folder `build` with one folder for each variant.
        cuda (`str`, *optional*):
            The version of CUDA that the installed library was built with, such as `"13.0"`: adds the variant with the
            library, for this machine's platform. Without it, `fft_conv` computes with torch.fft there.

    Returns:
        `Path`: The folder `build`.

    Raises:
        ValueError: `cuda` is not a version, or there is no CUDA library to add.
    """
    build = Path(folder) / "build"
    _write_variant(build / "torch-cpu", {"type": "cpu"}, library=None)
    if cuda is None:
        _write_variant(build / "torch-cuda", {"type": "cuda"}, library=None)
        return build
    version = re.fullmatch(r"(\d+)\.(\d)", cuda)
    if version is None:
        raise ValueError(f"cuda must be a version such as '13.0', got {cuda!r}")
    if not extension.PATH.exists():
        raise ValueError(f"there is no CUDA library to add: {extension.PATH} does not exist")
    system = f"{platform.machine()}-{platform.system().lower()}"
    _write_variant(build / f"{_TORCH}-cu{version[1]}{version[2]}-{system}", {"type": "cuda"}, extension.PATH)
    return build


def _write_variant(folder: Path, backend: dict[str, Any], library: Path | None) -> None:
    source = Path(__file__).parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(_INIT)
    for part in _PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / part, folder / part)
    if library is not None:
        (folder / "lib").mkdir()
        shutil.copy(library, folder / "lib" / library.name)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:12]
    # Operators live under the identifier: another build, or the package, may be loaded beside this one.
    identifier = f"_hf_flashfftconv_{backend['type']}_{digest}"
    metadata = {"name": NAME, "id": identifier, "version": 1, "license": "Apache-2.0", "python-depends": []}
    metadata["backend"] = backend
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
