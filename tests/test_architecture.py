"""The house rules that a machine can check: import direction, file sizes, banned calls, public names, light import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_flashfftconv

PACKAGE = Path(hf_flashfftconv.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# What each part may import of the others (and always of itself and of `errors`).
MAY_IMPORT = {
    "errors": set(),
    "ops": set(),
    "functional": {"ops"},
    "nn": {"ops", "functional"},
    "kernel_layers": {"functional"},
    "kernel_repository": {"ops", "kernel_layers"},
    "streaming": {"ops", "functional"},
    "slices": set(),
    "models": {"ops", "functional", "nn", "kernel_repository", "streaming", "slices"},
    "adapters": {"ops", "functional"},
    "report": {"ops", "functional", "adapters"},
    "patch": {"ops", "functional", "adapters", "report"},
    "sequences": {"ops", "functional", "slices", "adapters", "patch"},
    "sparsity": {"ops", "adapters"},
    "shim": set(),
    "hub": {"ops", "adapters", "sparsity", "shim"},
    "bench": {"ops", "functional", "nn", "models", "adapters", "report", "patch", "sparsity"},
    "cli": {"ops", "functional", "nn", "models", "adapters", "report", "patch", "sparsity", "hub", "bench"},
    "__init__": {"functional", "nn", "models", "patch", "sequences", "sparsity", "hub"},
}

BANNED_CALLS = {"print", "eval", "exec", "breakpoint", "torch.load", "torch.save"}
BANNED_MODULES = {"pickle", "dill", "marshal", "shelve"}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(file: Path, source: str) -> Iterator[str]:
    """Absolute names of all modules (and of the names taken from them) that a file imports, anywhere in its text."""
    # Relative imports count from the package that holds the file.
    package = (PACKAGE.name, *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def forbidden_imports(file: Path, source: str) -> list[str]:
    part = part_of(file)
    allowed = MAY_IMPORT[part] | {part, "errors"}
    found = []
    for module in imported_modules(file, source):
        root, *rest = module.split(".")
        if (
            root == PACKAGE.name
            and rest
            and (rest[0] not in allowed if rest[0] in MAY_IMPORT else rest[0] != "__version__")
        ):
            found.append(f"{part} imports {module}")
        if part in ("ops", "functional", "nn") and root == "transformers":
            found.append(f"{part} imports {module}")
    return found


def banned_constructs(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            found.append(f"assert in line {node.lineno}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in BANNED_CALLS:
            found.append(f"{ast.unparse(node.func)} in line {node.lineno}")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [f"{name} in line {node.lineno}" for name in names if name.split(".")[0] in BANNED_MODULES]
        # A part of the package that is missing is an error, not a variant.
        if isinstance(node, ast.Try) and any(isinstance(x, ast.ImportFrom) and x.level for x in node.body):
            found.append(f"guarded import in line {node.lineno}")
    return found


def ids(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_doors_open_one_way(file: Path) -> None:
    assert not forbidden_imports(file, file.read_text())


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_nothing_banned(file: Path) -> None:
    assert not banned_constructs(file.read_text())


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_files_are_small_and_plain(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert text.isascii()
    assert not text or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize(
    "name, source",
    [
        ("ops/x.py", "from ..functional import fft_conv"),
        ("ops/x.py", "import transformers"),
        ("ops/x.py", "def f():\n    from transformers import AutoModel"),
        ("functional.py", "from .nn import FlashFFTConv"),
        ("functional.py", "from . import patch"),
        ("patch.py", "import hf_flashfftconv.sparsity.pattern"),
        ("patch.py", "from hf_flashfftconv import hub"),
        ("adapters/x.py", "from ..models.hyena import HyenaFilter"),
        ("models/x.py", "from ..adapters import base"),
        ("hub.py", "from . import cli"),
        ("ops/x.py", "from hf_flashfftconv import fft_conv"),
    ],
)
def test_the_import_check_can_fail(name: str, source: str) -> None:
    assert forbidden_imports(PACKAGE / name, source)


@pytest.mark.parametrize(
    "source",
    [
        "assert x",
        "print(1)",
        "import pickle",
        "from pickle import loads",
        "torch.load(f)",
        "eval(s)",
        "try:\n    from . import a\nexcept ImportError:\n    pass",
    ],
)
def test_the_ban_can_fail(source: str) -> None:
    assert banned_constructs(source)


def test_public_names() -> None:
    assert hf_flashfftconv.__all__ == [
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
    for name in hf_flashfftconv.__all__:
        assert name in dir(hf_flashfftconv)
        assert callable(getattr(hf_flashfftconv, name))
        assert getattr(hf_flashfftconv, name).__doc__


def test_one_version() -> None:
    assert f'\nversion = "{hf_flashfftconv.__version__}"\n' in (PACKAGE.parent / "pyproject.toml").read_text()


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'hf_flashfftconv' has no attribute 'fft_convolve'"):
        hf_flashfftconv.fft_convolve  # noqa: B018


def test_import_is_light() -> None:
    code = """
import socket, sys
def refuse(*_): raise RuntimeError("network")
socket.socket.connect = refuse
import hf_flashfftconv.functional, torch
from hf_flashfftconv.ops import extension
assert not torch.cuda.is_initialized() and extension.load.cache_info().currsize == 0
assert "matplotlib" not in sys.modules and "hf_flashfftconv.hub" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=PACKAGE.parent)
