"""The benchmark: what it counts, how it treats rivals that refuse, and its report; on a device a small run, too."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hf_flashfftconv import bench as package
from hf_flashfftconv import cli, fft_conv
from hf_flashfftconv.bench import Problem, Report, Result, bench, contenders, run

BF16 = torch.bfloat16


def problem(**changes: object) -> Problem:
    return Problem(**{"batch": 4, "channels": 3, "length": 64, "dtype": BF16, "gated": True, **changes})


@pytest.mark.parametrize("gated, forward, both", [(True, 8, 22), (False, 4, 10)])
@pytest.mark.parametrize("dtype, scale", [(BF16, 1), (torch.float32, 2)], ids=str)
def test_floors(gated: bool, forward: int, both: int, dtype: torch.dtype, scale: int) -> None:
    some = problem(gated=gated, dtype=dtype)
    positions = 4 * 3 * 64
    assert some.floor_bytes(False) == forward * scale * positions
    assert some.floor_bytes(True) == both * scale * positions


def on_cpu(some: Problem) -> dict[str, Tensor]:
    shape = (some.batch, some.channels, some.length)
    operands = {name: torch.randn(shape, dtype=some.dtype) for name in ("u", "pre_gate", "post_gate")}
    return operands | {"k": torch.randn(some.channels, some.length)}


@pytest.mark.parametrize("batch, channels", [(4, 9), (1, 1)])
def test_errors(batch: int, channels: int) -> None:
    some = problem(batch=batch, channels=channels)
    operands = on_cpu(some)
    y = fft_conv(**operands)
    assert 1e-3 < some.error(y, operands) < 3e-3
    y[-1, -1] *= 1.1
    assert some.error(y, operands) > 1e-2


class Stopwatch:
    """Finds that everything takes a millisecond."""

    def seconds(self, work: Callable[[], object]) -> float:
        work()
        return 1e-3


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Measures a contender on the CPU, at a bandwidth of a byte a microsecond."""
    monkeypatch.setattr(Problem, "operands", on_cpu)
    monkeypatch.setattr(run, "peak_extra_bytes", lambda work: 100)
    monkeypatch.setattr(run, "device_memory", lambda: 1 << 30)
    monkeypatch.setattr(run, "gc", SimpleNamespace(collect=lambda: None))  # a second each, for memory that is not full

    def measure(forward: Callable[..., Tensor], backward: bool = False, has_gradients: bool = True) -> Result:
        monkeypatch.setitem(run.CONTENDERS, "x", (lambda problem: forward, has_gradients))
        return run._measure("x", problem(), backward, Stopwatch(), 1e6)

    return measure


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_measured(measure: Callable[..., Result], backward: bool) -> None:
    result = measure(fft_conv, backward)
    assert result.ms == 1 and result.extra_bytes == 100 and result.note == ""
    assert result.floor_ms == (22 if backward else 8) * 4 * 3 * 64 * 1e-3
    assert result.over_floor == 1 / result.floor_ms
    assert 1e-3 < result.error < 3e-3


def test_gradient_errors() -> None:
    some = problem(channels=5)
    operands = {name: x.requires_grad_() for name, x in on_cpu(some).items()}
    dy = torch.randn(4, 5, 64, dtype=BF16)
    (du,) = torch.autograd.grad(fft_conv(**operands), operands["u"], dy)
    assert 1e-3 < some.gradient_error(du, dy, operands) < 3e-3
    assert some.gradient_error(du * 1.1, dy, operands) > 5e-2
    assert all(x.grad is None for x in operands.values())


@pytest.mark.parametrize("fits, times, note", [(4, 3, "4 x 1"), (1, 12, "1 x 1"), (11, 3, "4 x 1"), (12, 1, "")])
def test_fewer_sequences_where_the_memory_does_not_suffice(
    measure: Callable[..., Result], fits: int, times: int, note: str
) -> None:
    def forward(u: Tensor, **operands: Tensor) -> Tensor:
        if u.shape[0] * u.shape[1] > fits:
            raise torch.OutOfMemoryError("full")
        return fft_conv(u, **operands)

    result = measure(forward)
    assert result.ms == pytest.approx(times) and result.extra_bytes == 100 * times
    assert result.note == (note and f"measured with {note} sequences")

    def never(**operands: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    assert measure(never).ms is None and measure(never).note == "out of memory"


def test_what_cannot_fit_is_not_tried(measure: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def forward(u: Tensor, **operands: Tensor) -> Tensor:
        tried.append(u.shape[:2])
        return fft_conv(u, **operands)

    monkeypatch.setattr(run, "device_memory", lambda: 2 * 8 * 64 * 4)
    assert measure(forward).ms == 3 and set(tried) == {(4, 1)}
    monkeypatch.setattr(run, "device_memory", lambda: 0)
    assert measure(forward).note == "out of memory"


@pytest.mark.parametrize("kind", [contenders.Unavailable, RuntimeError, ValueError, AssertionError])
def test_rivals_that_refuse_are_noted(measure: Callable[..., Result], kind: type[Exception]) -> None:
    def forward(**operands: Tensor) -> Tensor:
        raise kind("not today\nnor tomorrow")

    result = measure(forward)
    assert result.ms is None and result.note == "not today"
    assert measure(fft_conv, backward=True, has_gradients=False).note == "forward only"


def test_rivals_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(contenders.Unavailable, match="flashfftconv is not installed"):
        contenders.flashfftconv(problem())
    monkeypatch.setenv(contenders.CUDNN_VARIABLE, "nowhere.so")
    contenders._cudnn_library.cache_clear()
    with pytest.raises(contenders.Unavailable, match=contenders.CUDNN_VARIABLE):
        contenders.cudnn(problem())


def test_shorter_filters() -> None:
    assert [problem(filter_length=taps).taps for taps in (None, 10, 100)] == [64, 10, 64]
    for rival in (contenders.flashfftconv, contenders.cudnn):
        with pytest.raises(contenders.Unavailable, match="filters as long as the sequences"):
            rival(problem(filter_length=10))


@pytest.fixture
def report() -> Report:
    ours = [
        Result("ours", length, backward, 0.5, 0.75, 3 << 30, 1.8e-3) for length in (512, 4096) for backward in (0, 1)
    ]
    rival = [Result("rival", 512, False, 0.5, 2.0, 1 << 30, 4e-3, "measured with batch 2")]
    rival += [Result("rival", 4096, False, 0.5, note="not there"), Result("rival", 512, True, 0.5, note="forward only")]
    return Report({"device": "a GPU"}, {"batch": 64}, [*ours, *rival])


def test_the_table(report: Report) -> None:
    lines = f"{report}".splitlines()
    assert lines[:2] == ["device: a GPU", "batch: 64"]
    table = [line.split() for line in lines[3:]]
    assert table[0] == ["length", "pass", "contender", "ms", "x", "floor", "extra", "GiB", "error"]
    assert ["4,096", "fwd", "ours", "0.750", "1.50", "3.00", "1.8e-03"] in table
    assert ["512", "fwd", "rival", "2.000", "4.00", "1.00", "4.0e-03", "measured", "with", "batch", "2"] in table
    assert ["4,096", "fwd", "rival", "-", "-", "-", "-", "not", "there"] in table


def test_the_file(report: Report, tmp_path: Path) -> None:
    report.save_json(tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["environment"] == {"device": "a GPU"} and content["problem"] == {"batch": 64}
    assert len(content["results"]) == 7
    assert content["results"][0] == {
        "contender": "ours",
        "length": 512,
        "backward": False,
        "floor_ms": 0.5,
        "ms": 0.75,
        "extra_bytes": 3 << 30,
        "error": 1.8e-3,
        "note": "",
        "over_floor": 1.5,
    }


def test_the_plot(report: Report, tmp_path: Path) -> None:
    report.save_plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, report: Report
) -> None:
    asked = {}

    def fake(lengths: list[int] | None, **options: object) -> Report:
        asked.update(options, lengths=lengths)
        return report

    monkeypatch.setattr(package, "bench", fake)
    files = ["--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")]
    command = ["bench", "--lengths", "512", "4096", "--batch", "2", "--channels", "3", "--dtype", "float16", "--plain"]
    command += ["--filter-length", "64"]
    assert cli.main([*command, "--long", "--quick", *files]) == 0
    assert asked == {
        "lengths": [512, 4096],
        "batch": 2,
        "channels": 3,
        "dtype": torch.float16,
        "gated": False,
        "filter_length": 64,
        "long": True,
        "quick": True,
    }
    assert capsys.readouterr().out == f"{report}\n"
    assert (tmp_path / "x.json").exists() and (tmp_path / "x.png").exists()
    with pytest.raises(SystemExit):
        cli.main(["bench", "--batch", "0"])
    assert "'0' is not a positive whole number" in capsys.readouterr().err


def test_without_a_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--quick"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
def test_a_small_run(gated: bool, tmp_path: Path) -> None:
    report = bench([128, 1024], batch=4, channels=32, gated=gated, quick=True)
    assert len(report.results) == 2 * 2 * len(contenders.CONTENDERS)
    for result in report.results:
        if result.contender in ("hf_flashfftconv", "torch.fft"):
            assert result.ms > 0 and result.extra_bytes > 0 and not result.note
            assert 1e-3 < result.error < 4e-3
    report.save_json(tmp_path / "x.json")
    report.save_plot(tmp_path / "x.png")
