"""The README: its two commands, its code, its tables and its links say what the repository does."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakehub import LoopbackHub, Repository
from model_factory import remote_hyenadna_repo
from numerics import BFLOAT16, FLOAT16, FLOAT32, FLOAT32_TF32

import hf_flashfftconv
from hf_flashfftconv import cli
from hf_flashfftconv.adapters import supported_classes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RUN, TEST, *SHELL = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
TORCH = '"torch>=2.10,<2.14"'


def test_the_two_commands() -> None:
    for command in (RUN, TEST):
        assert command.count("\n") == 1, "one line each"
        assert command.startswith("python3 -m venv ")
        assert TORCH in command, "a range that is tested, also where later releases exist"
    assert RUN.endswith("python examples/quickstart.py\n")
    steps = ("ruff check .", "mypy", "pytest -n 2 --dist loadfile --cov --cov-fail-under=90")
    assert [step for step in steps if step not in TEST] == []
    assert README.index(RUN) < README.index(TEST) < min(map(README.index, PYTHON + SHELL))


def test_ci_runs_the_second_command(tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "README.md").write_text(README.replace(TEST, "false | true; echo unreachable\n"))
    assert run_ci(tmp_path).returncode != 0, "a failure anywhere in the command is a failure"
    (tmp_path / "README.md").write_text(README.replace(RUN, "echo first\n").replace(TEST, "echo second && pwd\n"))
    result = run_ci(tmp_path)
    assert (result.returncode, result.stdout.splitlines()[1:]) == (0, ["second", str(tmp_path)])
    (tmp_path / "README.md").write_text("no commands")
    assert run_ci(tmp_path).returncode != 0


def run_ci(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", folder / ".ci" / "run"], capture_output=True, text=True, timeout=60)


def test_python_blocks_run(tmp_path: Path) -> None:
    [name] = re.findall(r'^name = "(.*)"$', PYTHON[0], re.MULTILINE)
    repository = Repository()
    folder = remote_hyenadna_repo(tmp_path / "repository")
    repository.commit(
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    )
    check = "assert (again(dna).logits - model(dna).logits).abs().max() <= 1e-5 * model(dna).logits.abs().max()\n"
    path = os.pathsep.join([str(Path(hf_flashfftconv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with LoopbackHub() as hub:
        hub.repositories[name] = repository
        result = subprocess.run(
            [sys.executable, "-c", "\n".join([*PYTHON, check])],
            env={**os.environ, "PYTHONPATH": path, **hub.environment(tmp_path / "cache")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert result.returncode == 0, result.stderr
    assert "2 of 2 long convolutions replaced" in result.stdout


def test_shell_commands_are_understood() -> None:
    for line in "".join(SHELL).splitlines():
        program, *arguments = line.split()
        assert program == "hf-flashfftconv"
        cli._parser().parse_args(arguments)


def test_environment_variables_are_those_of_the_build() -> None:
    table = set(re.findall(r"^\| `([A-Z_]+)` \|", README, re.MULTILINE))
    build = (ROOT / "setup.py").read_text()
    assert table == set(re.findall(r"HF_FLASHFFTCONV_\w+", build)) | {"MAX_JOBS", "NVCC_APPEND_FLAGS"}
    [architectures] = re.findall(r"^ARCHITECTURES = \((.*)\)$", build, re.MULTILINE)
    *numbers, last = re.findall(r"\d+", architectures)
    assert f"sm_{', '.join(numbers)} and {last}" in README


def test_the_numerical_promise_is_the_one_that_is_tested() -> None:
    promises = {"bfloat16": BFLOAT16, "float16": FLOAT16, "float32": FLOAT32, "float32, TF32 allowed": FLOAT32_TF32}
    for name, bounds in promises.items():
        [row] = re.findall(rf"^\| {name} \|(.*)\|$", README, re.MULTILINE)
        promised = [float(cell) for cell in row.split("|")]
        assert promised == pytest.approx([bounds.whole, bounds.row, bounds.gradient, bounds.taps], rel=0.05)


def test_every_class_that_is_patched_is_named() -> None:
    section = README[README.index("## Supported models") : README.index("## The CUDA library")]
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|[^|]*\|[^|]*\|$", section, re.MULTILINE)
    assert set(supported_classes()) <= {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https://)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
