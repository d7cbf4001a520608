"""The examples, run as a reader runs them, with fewer steps; those that need no process of their own share this one."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakehub import LoopbackHub
from transformers import AutoConfig

import hf_flashfftconv

ROOT = Path(__file__).resolve().parent.parent


def run_example(
    name: str, *arguments: object, environment: dict[str, str] | None = None, launcher: tuple[str, ...] = ()
) -> str:
    """What an example prints; the package is the one under test, installed or not."""
    path = os.pathsep.join([str(Path(hf_flashfftconv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", **(environment or {})}
    command = [sys.executable, *launcher, str(ROOT / "examples" / name), *map(str, arguments)]
    result = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The same without another process, whose imports would take most of the time."""
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def table(output: str) -> dict[str, float]:
    """The rows of the quickstart's table."""
    return {name: float(value) for name, value in re.findall(r"^  (\S.*?) {2,}(\S+)$", output, re.MULTILINE)}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart") / "model"
    return folder, run_example("quickstart.py", "--steps", 5, "--output", folder)


def check(output: str) -> None:
    rows = table(output)
    assert rows["trained"] < rows["before training"]
    assert rows["sparse, saved and reloaded"] == rows["sparse, 6% of the frequencies"]
    assert rows["patched to unpatched, logits"] < 1e-5
    assert 0 < rows["patched to unpatched, gradients"] < 1e-5
    assert rows["reloaded to saved, logits"] == 0
    assert re.search(r"^2 of 2 long convolutions replaced$", output, re.MULTILINE)


def test_quickstart(quickstart: tuple[Path, str]) -> None:
    folder, output = quickstart
    check(output)
    assert table(output)["before training"] > 10, "a model that knows nothing guesses among all tokens"
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert AutoConfig.from_pretrained(folder).quantization_config["masks"].keys() == {
        f"backbone.layers.{layer}.mixer.filter_fn" for layer in range(2)
    }


def test_quickstart_on_a_saved_model(
    quickstart: tuple[Path, str], tmp_path: Path, run_here: Callable[..., str]
) -> None:
    output = run_here("quickstart.py", "--model", quickstart[0], "--steps", 2, "--output", tmp_path / "tuned")
    check(output)


def test_generate_dna(quickstart: tuple[Path, str], run_here: Callable[..., str]) -> None:
    output = run_here("generate_dna.py", "--model", quickstart[0], "--prompt", 50, "--bases", 20)
    assert re.search(r"^continuation  [ACGT]{20}$", output, re.MULTILINE)
    assert re.search(r"^genome +0\.25 +0\.23 +0\.26 +0\.25$", output, re.MULTILINE)
    assert output.endswith("the same bases: True\n")


def test_push_to_hub(quickstart: tuple[Path, str], tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path)
        output = run_example(
            "push_to_hub.py", "--model", quickstart[0], "--repo", "tester/lambda", environment=environment
        )
        files = hub.repositories["tester/lambda"].files
    assert f"pushed {hub.url}/tester/lambda/commit/" in output
    assert "logits differ by 0.0e+00" in output
    assert "hyena.backbone.layers.1.mixer.filter_fn" in output, "the published filters are sparse"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer_config.json"} <= files.keys()


def test_long_dna(run_here: Callable[..., str]) -> None:
    sizes = ("--length", 3000, "--positions", 1000, "--width", 16)
    output = run_here("long_dna.py", *sizes, "--train", "--steps", 2, "--dtype", "bfloat16")
    assert output.startswith("3,000 bases in one piece")
    first, second = re.findall(r"perplexity per base (\S+)$", output, re.MULTILINE)
    assert 10 < float(second) < float(first) < 20, "a model that knows nothing guesses among all tokens"


def test_several_gpus() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    sizes = ("--length", 512, "--width", 16, "--steps", 2)
    output = run_example(
        "several_gpus.py", "--compare", *sizes, launcher=launcher, environment={"OMP_NUM_THREADS": "1"}
    )
    assert "512 positions, 2 processes on cpu, float32" in output
    [losses] = re.findall(r"loss +(\S+), alone (\S+)$", output, re.MULTILINE)
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=2e-5)
