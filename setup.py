"""Builds the CUDA library, where there is an nvcc, beside the pure Python package described in pyproject.toml.

The library has a C interface and knows nothing of torch or Python: nvcc alone builds it, with or without a GPU and
whatever torch is installed. Environment variables (the README has the table):

    HF_FLASHFFTCONV_CUDA        0: Python only; 1: a missing nvcc is an error; unset: build where nvcc is found
    HF_FLASHFFTCONV_CUDA_ARCHS  native (default), all, or a list such as "80;90"
    MAX_JOBS                    nvcc processes side by side (default: one per core)
    NVCC_APPEND_FLAGS           more flags for nvcc, such as -lineinfo for profilers
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

PACKAGE = "hf_flashfftconv"
LIBRARY = f"lib{PACKAGE}.so"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
# Of major versions with clusters of thread blocks, what opens the instructions that later versions may lack.
OWN_INSTRUCTIONS = {"9": "a", "10": "f"}
COMPILE_FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC")
LINK_FLAGS = ("-shared", "-cudart", "static")


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, of PATH or of /usr/local/cuda, in this order."""
    candidates = [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates += [Path(shutil.which("nvcc") or ""), Path("/usr/local/cuda/bin/nvcc")]
    return next((str(path) for path in candidates if path.is_file()), None)


def cuda_build(sources: list[Path]) -> tuple[str | None, str]:
    """The nvcc to build with, or None and the reason why the package is installed Python-only."""
    switch = os.environ.get("HF_FLASHFFTCONV_CUDA", "")
    if switch not in ("", "0", "1"):
        raise SetupError(f"HF_FLASHFFTCONV_CUDA={switch!r}: supported are 0, 1 and unset")
    if switch == "0":
        return None, "HF_FLASHFFTCONV_CUDA=0"
    nvcc = find_nvcc() if sys.platform == "linux" else None
    if nvcc is None:
        reason = "no nvcc in CUDA_HOME, PATH or /usr/local/cuda"
        if switch == "1":
            raise SetupError(f"HF_FLASHFFTCONV_CUDA=1, but there is {reason}")
        return None, reason
    return (nvcc, "") if sources else (None, "no CUDA sources in csrc/")


def gencode_flags(architectures: str) -> list[str]:
    """nvcc's -gencode flags for `native`, `all` or a list such as `80;90` (`90+PTX` adds PTX for later GPUs)."""
    if architectures == "native":
        architectures = ";".join(present_gpus()) or "90+PTX"
    elif architectures == "all":
        architectures = ";".join(ARCHITECTURES) + "+PTX"
    flags = []
    for name in re.split(r"[;,\s]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise SetupError(f"HF_FLASHFFTCONV_CUDA_ARCHS: {name!r} is not one of native, all or a list such as 80;90")
        sm = match[1] + match[2] + match[3]
        own = sm if match[3] else sm + OWN_INSTRUCTIONS.get(match[1], "")
        flags += ["-gencode", f"arch=compute_{own},code=sm_{own}"]
        if match[4]:
            flags += ["-gencode", f"arch=compute_{sm},code=compute_{sm}"]
    return flags


def present_gpus() -> list[str]:
    """Compute capabilities of this machine's GPUs that the kernels support, such as `["90"]`."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({major + minor for major, minor in re.findall(r"(\d+)\.(\d)", found) if int(major) >= 8})


def build_library(nvcc: str, sources: list[Path], target: Path, cache: Path) -> str:
    """Compile every source side by side, link them, and return what ptxas said about the kernels.

    An object and its ptxas log are kept under the hash of everything that went into them, so that nothing is compiled
    again while neither the sources, the flags nor the compiler have changed.
    """
    gencode = gencode_flags(os.environ.get("HF_FLASHFFTCONV_CUDA_ARCHS", "") or "native")
    flags = [*COMPILE_FLAGS, *gencode]
    headers = sorted(path for folder in {source.parent for source in sources} for path in folder.glob("*.*h"))
    # nvcc reads these from the environment by itself.
    appended = os.environ.get("NVCC_APPEND_FLAGS", "")
    common = [nvcc_command(nvcc, "--version"), " ".join(flags) + appended, *(path.read_text() for path in headers)]
    cache.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> tuple[Path, str]:
        digest = hashlib.sha256("\0".join([*common, source.read_text()]).encode()).hexdigest()[:16]
        built = cache / f"{source.stem}.{digest}.o"
        log = built.with_suffix(".log")
        if not (built.exists() and log.exists()):
            for stale in cache.glob(f"{source.stem}.*"):
                stale.unlink()
            partial = built.with_suffix(".part")
            text = nvcc_command(nvcc, *flags, "-c", str(source), "-o", str(partial))
            log.write_text(text)
            partial.rename(built)
        return built, log.read_text()

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        objects, logs = zip(*pool.map(compile_one, sources), strict=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    exports = f"--version-script={sources[0].with_name('exports.map')}"
    nvcc_command(nvcc, *LINK_FLAGS, "-Xlinker", exports, *gencode, "-o", str(target), *map(str, objects))
    return "".join(logs)


def nvcc_command(nvcc: str, *arguments: str) -> str:
    """Run nvcc and return all that it printed; a failure is an error with that text."""
    result = subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise CompileError(f"{nvcc} {' '.join(arguments)}\nfailed with exit code {result.returncode}:\n{result.stdout}")
    return result.stdout


def kernel_resources(ptxas_log: str) -> list[dict[str, str | int]]:
    """What ptxas reports per kernel: name, architecture, registers, static shared memory and spill in bytes."""

    def number(pattern: str, text: str) -> int:
        return sum(int(found) for found in re.findall(pattern, text))

    sections = re.split(r"Compiling entry function '(\S+)' for '(\S+)'", ptxas_log)[1:]
    return [
        {
            "kernel": name,
            "architecture": architecture,
            "registers": number(r"Used (\d+) registers", text),
            "shared": number(r"(\d+) bytes smem", text),
            "spill": number(r"(\d+) bytes spill (?:stores|loads)", text),
        }
        for name, architecture, text in zip(sections[::3], sections[1::3], sections[2::3], strict=True)
    ]


def kernel_table(ptxas_log: str) -> str:
    """The resources of all kernels as text, names demangled where binutils are installed."""
    rows = ["arch    registers  shared bytes  spill bytes  kernel"]
    rows += [
        f"{row['architecture']:<7} {row['registers']:>9}  {row['shared']:>12}  {row['spill']:>11}  {row['kernel']}"
        for row in kernel_resources(ptxas_log)
    ]
    table = "\n".join(rows)
    demangle = shutil.which("c++filt")
    return subprocess.run([demangle], input=table, capture_output=True, text=True).stdout if demangle else table


class BuildCuda(build_ext):
    """The shared library in the place of a Python extension: wheels and editable installs then treat it as one."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        log = build_library(NVCC, [Path(source) for source in ext.sources], target, Path("build", "cuda"))
        print(kernel_table(log), flush=True)

    def copy_extensions_to_source(self) -> None:
        Path(PACKAGE, "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()


class BuildPackage(build_py):
    """Starts from an empty build folder, so that an install never carries files of an earlier build."""

    def run(self) -> None:
        if NVCC is None:
            print(f"{PACKAGE}: building WITHOUT the CUDA library: {REASON}", file=sys.stderr, flush=True)
            if self.editable_mode:
                Path(PACKAGE, "lib", LIBRARY).unlink(missing_ok=True)
        shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)
        super().run()


class LibraryWheel(bdist_wheel):
    """One library serves every Python: py3-none-linux_x86_64 with it, py3-none-any without."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


SOURCES = sorted(Path("csrc").glob("*.cu"))
NVCC, REASON = cuda_build(SOURCES)

if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"{PACKAGE}.lib.{LIBRARY[:-3]}", [str(path) for path in SOURCES])] if NVCC else [],
        cmdclass={"build_ext": BuildCuda, "build_py": BuildPackage, "bdist_wheel": LibraryWheel},
    )
