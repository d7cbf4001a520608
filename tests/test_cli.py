"""The `hf-flashfftconv` command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakehub import LoopbackHub
from model_factory import remote_hyenadna_repo, tiny_hyenadna, tiny_hyenadna_classifier, tiny_m2bert
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import hf_flashfftconv
from hf_flashfftconv import cli
from hf_flashfftconv.models import HyenaDNATokenizer
from hf_flashfftconv.ops import extension
from hf_flashfftconv.sparsity import sparsity_report

FILTERS = [f"hyena.backbone.layers.{layer}.mixer.filter_fn" for layer in range(2)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    hf_flashfftconv.save_pretrained(tiny_hyenadna(), tmp_path / "dense", tokenizer=HyenaDNATokenizer())
    return tmp_path / "dense"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 1
    output, message = capsys.readouterr()
    assert output == ""
    return re.search(r"^hf-flashfftconv: (.*)", message, re.MULTILINE | re.DOTALL)[1]


def test_inspect(capsys, checkpoint):
    output = run(capsys, "inspect", checkpoint)
    assert output.startswith(f"HyenaDNAForCausalLM, {tiny_hyenadna().num_parameters():,} parameters\n")
    assert "2 of 2 long convolutions replaced" in output
    assert output.endswith("no sparse filters\n")


def test_inspect_keeps_the_head(capsys, tmp_path):
    for model in (tiny_hyenadna_classifier(), tiny_m2bert(), tiny_hyenadna().base_model):
        model.save_pretrained(tmp_path / "model")
        assert run(capsys, "inspect", tmp_path / "model").startswith(type(model).__name__)


def test_inspect_remote_code(capsys, tmp_path):
    repo = remote_hyenadna_repo(tmp_path / "remote")
    assert "2 of 2 long convolutions replaced" in run(capsys, "inspect", repo, "--trust-remote-code")


def test_inspect_a_model_without_long_convolutions(capsys, tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    BertModel(config).save_pretrained(tmp_path)
    assert "0 of 0 long convolutions replaced" in run(capsys, "inspect", tmp_path)


def test_sparsify(capsys, checkpoint, tmp_path):
    output = run(capsys, "sparsify", checkpoint, "--keep", "0.25", "--output", tmp_path / "sparse")
    assert all(name in output for name in FILTERS)
    assert output.endswith(f"saved to {tmp_path / 'sparse'}\n")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert sparsity_report(model).density == pytest.approx(0.25, abs=0.01)
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    hf_flashfftconv.densify_model(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    assert (tmp_path / "sparse" / "tokenizer_config.json").exists()
    assert all(name in run(capsys, "inspect", tmp_path / "sparse") for name in FILTERS)


def test_sparsify_some_layers_by_energy(capsys, checkpoint, tmp_path):
    arguments = ("--keep", "0.9", "--by", "energy", "--layers", "*layers.1*", "--output", tmp_path / "sparse")
    output = run(capsys, "sparsify", checkpoint, *arguments)
    assert FILTERS[1] in output and FILTERS[0] not in output


def test_sparsify_a_number_of_blocks(capsys, checkpoint, tmp_path):
    run(capsys, "sparsify", checkpoint, "--keep", "3", "--output", tmp_path / "sparse")
    report = sparsity_report(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"))
    assert {row.kept_bins for row in report} == {3}


def test_sparsify_without_a_tokenizer(capsys, caplog, tmp_path):
    tiny_m2bert().save_pretrained(tmp_path / "dense")
    run(capsys, "sparsify", tmp_path / "dense", "--keep", "0.5", "--output", tmp_path / "sparse")
    assert "no tokenizer" in caplog.text
    assert not (tmp_path / "sparse" / "tokenizer_config.json").exists()


def test_sparsify_and_push(checkpoint, tmp_path):
    with LoopbackHub() as hub:
        command = [sys.executable, "-m", "hf_flashfftconv.cli", "sparsify", checkpoint, "--keep", "0.5"]
        result = subprocess.run(
            [*command, "--output", tmp_path / "sparse", "--push", "tester/sparse"],
            env={**hub.environment(tmp_path / "cache"), "PYTHONPATH": str(Path(hf_flashfftconv.__file__).parents[1])},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert f"pushed to {hub.url}/tester/sparse/commit/" in result.stdout
        files = hub.repositories["tester/sparse"].files
    saved = tmp_path / "sparse"
    assert files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert json.loads(files["config.json"]) == json.loads((saved / "config.json").read_text())


def test_env(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_DISTRIBUTIONS", ("torch", "no-such-distribution"))
    monkeypatch.setattr(extension, "load", lambda: "the CUDA library is not built (Python-only install)")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    facts = dict(re.split(" {2,}", line) for line in run(capsys, "env").splitlines())
    assert facts["hf-flashfftconv"] == hf_flashfftconv.__version__
    assert facts["torch"] == torch.__version__
    assert facts["no-such-distribution"] == "not installed"
    assert facts["GPU 0"] == "NVIDIA H100, compute capability 9.0"
    assert facts["CUDA library"] == "the CUDA library is not built (Python-only install)"


def test_errors_are_messages(capsys, monkeypatch, checkpoint, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / "sparse"
    sparsify = ("sparsify", checkpoint, "--output", output)
    assert "got 0.0" in failure(capsys, *sparsify, "--keep", "0.0")
    assert "'*layers.9*'" in failure(capsys, *sparsify, "--keep", "0.5", "--layers", "*layers.9*")
    assert not output.exists()
    assert "no/where" in failure(capsys, "inspect", tmp_path / "no/where")

    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["HyenaForSomething"]}))
    assert "HyenaForSomething" in failure(capsys, "inspect", checkpoint)


@pytest.mark.parametrize("arguments", [[], ["bake"], ["sparsify", "x", "--keep", "half", "--output", "y"]])
def test_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: hf-flashfftconv" in capsys.readouterr().err
