"""The build: what is compiled for which GPUs, what is reused, and what the wheel contains."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_flashfftconv"

PTXAS_LOG = """\
ptxas info    : 12 bytes gmem
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90'
ptxas info    : Function properties for _Z3addPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 256 bytes smem, 536 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3mulPf' for 'sm_80'
ptxas info    : Function properties for _Z3mulPf
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 360 bytes cmem[0]
"""

FAKE_NVCC = """\
#!/bin/sh
# Stands in for nvcc: notes its arguments, reports one kernel, and writes a file where it was told to.
[ "$1" = --version ] && { echo "nvcc of the tests"; exit 0; }
echo "$@" >> "$(dirname "$0")/calls"
case "$*" in *broken.cu*) echo "broken.cu(1): error: nonsense"; exit 2;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo binary > "$2"; shift; done
echo "ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90'"
"""


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """The functions of setup.py."""
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Path:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "stage.cuh").write_text("// shared")
    files = [folder / "small.cu", folder / "large.cu"]
    for file in files:
        file.write_text(f"// {file.stem}")
    return files


def calls(nvcc: Path) -> list[str]:
    log = nvcc.with_name("calls")
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def sm(*names: str) -> list[str]:
    return [flag for name in names for flag in ("-gencode", f"arch=compute_{name},code=sm_{name}")]


def ptx(name: str) -> list[str]:
    return ["-gencode", f"arch=compute_{name},code=compute_{name}"]


@pytest.mark.parametrize(
    ("architectures", "gpus", "expected"),
    [
        ("native", ["80", "90"], sm("80", "90a")),
        ("native", [], sm("90a") + ptx("90")),
        ("all", ["80"], sm("80", "86", "89", "90a", "100f", "120") + ptx("120")),
        ("80;90", [], sm("80", "90a")),
        ("8.0, 9.0a+PTX", [], sm("80", "90a") + ptx("90a")),
    ],
)
def test_architectures(build, monkeypatch, architectures, gpus, expected):
    monkeypatch.setattr(build, "present_gpus", lambda: gpus)
    assert build.gencode_flags(architectures) == expected


@pytest.mark.parametrize("architectures", ["hopper", "80;", "9", "90+ptx"])
def test_unknown_architecture(build, architectures):
    with pytest.raises(SetupError, match="HF_FLASHFFTCONV_CUDA_ARCHS"):
        build.gencode_flags(architectures)


def test_present_gpus_are_those_of_nvidia_smi(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.present_gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0; echo 7.5; echo 12.0; echo 9.0\n")
    tool.chmod(0o755)
    assert sorted(build.present_gpus()) == ["120", "90"], "7.5 has no bf16 and is left out"


def test_the_switch(build, monkeypatch, sources, fake_nvcc):
    monkeypatch.setattr(build, "find_nvcc", lambda: str(fake_nvcc))
    monkeypatch.setenv("HF_FLASHFFTCONV_CUDA", "0")
    assert build.cuda_build(sources) == (None, "HF_FLASHFFTCONV_CUDA=0")
    monkeypatch.setenv("HF_FLASHFFTCONV_CUDA", "1")
    assert build.cuda_build(sources) == (str(fake_nvcc), "")
    assert build.cuda_build([]) == (None, "no CUDA sources in csrc/")
    monkeypatch.setenv("HF_FLASHFFTCONV_CUDA", "yes")
    with pytest.raises(SetupError, match="'yes'"):
        build.cuda_build(sources)


def test_a_missing_nvcc(build, monkeypatch, sources):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.delenv("HF_FLASHFFTCONV_CUDA", raising=False)
    nvcc, reason = build.cuda_build(sources)
    assert nvcc is None and "no nvcc" in reason
    monkeypatch.setenv("HF_FLASHFFTCONV_CUDA", "1")
    with pytest.raises(SetupError, match="no nvcc"):
        build.cuda_build(sources)


def test_nvcc_of_cuda_home_comes_first(build, monkeypatch, fake_nvcc):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc.parent.parent))
    assert build.find_nvcc() == str(fake_nvcc)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(fake_nvcc.parent), prepend=os.pathsep)
    assert build.find_nvcc() == str(fake_nvcc)


def test_only_what_changed_is_compiled(build, monkeypatch, tmp_path, sources, fake_nvcc):
    target = tmp_path / "lib" / "library.so"

    def compiled() -> set[str]:
        log = build.build_library(str(fake_nvcc), sources, target, tmp_path / "cache")
        assert len(build.kernel_resources(log)) == 2, "the report covers reused objects too"
        assert target.read_text() == "binary\n"
        *compilations, link = calls(fake_nvcc)
        assert "-shared -cudart static" in link
        return {source.name for source in sources for call in compilations if f"-c {source}" in call}

    monkeypatch.setenv("HF_FLASHFFTCONV_CUDA_ARCHS", "90")
    assert compiled() == {"large.cu", "small.cu"}
    assert compiled() == set()
    sources[0].write_text("// changed")
    assert compiled() == {"small.cu"}
    sources[0].with_name("stage.cuh").write_text("// changed")
    assert compiled() == {"large.cu", "small.cu"}
    monkeypatch.setenv("HF_FLASHFFTCONV_CUDA_ARCHS", "80")
    assert compiled() == {"large.cu", "small.cu"}
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert compiled() == {"large.cu", "small.cu"}
    assert len(list((tmp_path / "cache").glob("*.o"))) == 2, "objects of earlier builds are removed"


def test_a_failed_compilation_is_an_error(build, tmp_path, sources, fake_nvcc):
    broken = sources[0].with_name("broken.cu")
    broken.touch()
    for _ in range(2):
        with pytest.raises(CompileError, match="nonsense"):
            build.build_library(str(fake_nvcc), [*sources, broken], tmp_path / "library.so", tmp_path / "cache")
    assert not (tmp_path / "library.so").exists()


def test_kernel_report(build):
    add, mul = build.kernel_resources(PTXAS_LOG)
    assert add == {"kernel": "_Z3addPf", "architecture": "sm_90", "registers": 10, "shared": 256, "spill": 0}
    assert mul == {"kernel": "_Z3mulPf", "architecture": "sm_80", "registers": 255, "shared": 0, "spill": 32}
    table = build.kernel_table(PTXAS_LOG).splitlines()
    assert len(table) == 3 and table[0].startswith("arch") and "add" in table[1]


@pytest.mark.parametrize("cuda", [False, True])
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path, fake_nvcc, cuda):
    tree = tmp_path / "tree"
    shutil.copytree(PACKAGE, tree / "hf_flashfftconv", ignore=shutil.ignore_patterns("__pycache__", "lib"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    expected = {str(file.relative_to(tree)) for file in tree.glob("hf_flashfftconv/**/*") if file.is_file()}
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for foreign in (
        "csrc/kernel.cu",
        "tests/test_it.py",
        "hf_flashfftconv/notes.txt",
        "hf_flashfftconv/lib/libhf_flashfftconv.so",
        "build/lib/hf_flashfftconv/removed.py",
        f"build/lib.{platform}/hf_flashfftconv/removed.py",
    ):
        (tree / foreign).parent.mkdir(parents=True, exist_ok=True)
        (tree / foreign).touch()

    environment = {**os.environ, "CUDA_HOME": str(fake_nvcc.parent.parent), "HF_FLASHFFTCONV_CUDA": str(int(cuda))}
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", f"-w{tmp_path}", tree]
    result = subprocess.run(pip, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("WITHOUT the CUDA library: HF_FLASHFFTCONV_CUDA=0" in result.stdout + result.stderr) != cuda

    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl" if cuda else "-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected | ({"hf_flashfftconv/lib/libhf_flashfftconv.so"} if cuda else set())


@pytest.fixture(scope="module")
def compiled(build: ModuleType) -> tuple[Path, list[dict[str, str | int]]]:
    """csrc/ compiled for sm_90: the library and its kernels. HF_FLASHFFTCONV_CUDA=1 forbids to skip without nvcc."""
    sources = sorted(ROOT.glob("csrc/*.cu"))
    if not sources:
        pytest.skip("no CUDA sources in csrc/")
    nvcc = build.find_nvcc()
    if nvcc is None and os.environ.get("HF_FLASHFFTCONV_CUDA") != "1":
        pytest.skip("no nvcc in CUDA_HOME, PATH or /usr/local/cuda")
    assert nvcc, "HF_FLASHFFTCONV_CUDA=1, but there is no nvcc"
    library = ROOT / "build" / "sm_90" / build.LIBRARY
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_FLASHFFTCONV_CUDA_ARCHS", "90+PTX")
        log = build.build_library(nvcc, sources, library, ROOT / "build" / "cuda")
    return library, build.kernel_resources(log)


# Bytes of spill stores and loads that a hot kernel may have, by its mangled name: the folded transforms, which serve
# causal and bidirectional convolutions. Forward kernels run three groups of warps on 80 registers a thread, which is
# faster than two groups with all that they ask for; what they park is read once a tile. Those of large clusters and of
# blocks count what they hand to functions for tiles that are not regular; the others, whose groups have registers of
# their own, have no functions, and nearly all that they spill is what such tiles need. The longest have 32 slots in
# registers, and the sums of as many.
SPILL_LIMITS = {
    r"filter_(stage_|rows_)?kernel": 0,
    r"window_sums_kernel": 0,
    r"tap_(gradient|rows|columns)_kernel": 0,
    r"14forward_kernel.*Li32ELb1ELi\d+ELb0E": 272,
    r"14forward_kernel.*(bfloat16|half)Li32ELb1ELi1ELb1E": 850,
    r"14cluster_kernel.*(bfloat16|half)Li32ELb1ELi1ELb0ELi\d+EELb0E": 512,
    r"14cluster_kernel.*(bfloat16|half)Li32ELb1ELi1ELb0ELi(8|16)EELb1E": 470,
    r"14cluster_kernel.*(bfloat16|half)Li32ELb1ELi1ELb0ELi(2|4)EELb1E": 920,
    r"14cluster_kernel.*(bfloat16|half)Li32ELb1ELi1ELb1E": 690,
    r"15backward_kernel.*Li32ELb1": 680,
    r"long_forward_kernel.*Li8E": 0,
    r"long_forward_kernel.*(bfloat16|half)Li32E": 610,
    r"short_(forward|backward)_kernel": 0,
}


def test_hot_kernels_do_not_spill(compiled):
    _, kernels = compiled
    for pattern, limit in SPILL_LIMITS.items():
        hot = [kernel for kernel in kernels if re.search(pattern, kernel["kernel"])]
        assert hot, f"ptxas reported no kernel that matches {pattern}"
        assert [f"{kernel['kernel']}: {kernel['spill']} bytes" for kernel in hot if kernel["spill"] > limit] == []


def test_the_library_exports_its_c_interface_only(compiled):
    library, _ = compiled
    listing = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    assert "fft_conv_version" in symbols
    assert [name for name in symbols if not name.startswith("fft_conv_")] == []
