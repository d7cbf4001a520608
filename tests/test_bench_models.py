"""The benchmark of whole models, on tiny ones on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from model_factory import tiny_hyenadna
from torch import nn

from hf_flashfftconv import cli, save_pretrained
from hf_flashfftconv.adapters.swap import is_patched
from hf_flashfftconv.bench import bench_model
from hf_flashfftconv.errors import PatchError


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_what_is_measured(mode: str, dtype: torch.dtype, error: float) -> None:
    model = tiny_hyenadna()
    report = bench_model(model, batch=2, length=31, mode=mode, dtype=dtype, device="cpu", repetitions=3)
    assert [result.way for result in report.results] == ["unpatched", "patched"]
    for result in report.results:
        assert result.ms > 0 and result.error <= error and result.peak_bytes is None
    assert report.results[0].speedup == 1
    assert report.results[1].speedup == report.results[0].ms / report.results[1].ms
    assert (report.results[1].error > 0) and (dtype == torch.float32) == (report.results[0].error == 0)
    assert not any(map(is_patched, model.modules())) and all(p.grad is None for p in model.parameters())


def test_no_token_is_padding() -> None:
    model, seen = tiny_hyenadna(), []
    model.config.pad_token_id = model.config.vocab_size - 1
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    bench_model(model, batch=2, length=50, device="cpu", repetitions=1)
    assert seen and all(tokens.unique().tolist() == list(range(model.config.pad_token_id)) for tokens in seen)


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tiny_hyenadna(n_layer=1)
    save_pretrained(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    arguments = ["bench-model", str(tmp_path / "model"), "--random-weights", "--length", "20", "--dtype", "float32"]
    assert cli.main([*arguments, "--cache-bytes", "0", "--json", str(tmp_path / "result.json")]) == 0
    assert "unpatched" in capsys.readouterr().out
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["problem"]["length"] == 20 and saved["problem"]["cache_bytes"] == 0 and len(saved["results"]) == 2


def test_the_mode_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode) or model)
    for options in ({"compiled": True}, {"compile_mode": "reduce-overhead"}):
        report = bench_model(tiny_hyenadna(n_layer=1), length=20, device="cpu", repetitions=3, **options)
        assert report.results[-1].way == "patched, compiled"
        assert report.problem.get("compile mode") == options.get("compile_mode")
    assert modes == [None, "reduce-overhead"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown compile_mode 'fast'; supported: 'default', 'reduce-overhead', "):
        bench_model(tiny_hyenadna(), compile_mode="fast")
    with pytest.raises(ValueError, match="unknown mode 'fast'; supported: 'inference', 'training'"):
        bench_model(tiny_hyenadna(), mode="fast")
    with pytest.raises(PatchError, match="cache_bytes"):
        bench_model(tiny_hyenadna(), length=20, device="cpu", cache_bytes=-1)
    with pytest.raises(ValueError, match=r"Linear has no config\.vocab_size"):
        bench_model(nn.Linear(2, 2))
