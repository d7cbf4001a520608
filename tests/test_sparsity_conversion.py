"""Sparsifying live models: what runs, what is reported, and that it can be undone."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_factory import dna_ids, remote_hyenadna_repo, tiny_hyena, tiny_hyenadna, tiny_m2bert
from numerics import error as relative_l2
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_flashfftconv import patch_model, unpatch_model
from hf_flashfftconv.errors import SparsityError
from hf_flashfftconv.sparsity import FrequencyMask, densify_model, sparsify_model, sparsity_report
from hf_flashfftconv.sparsity.filters import find_filters

FAMILIES = ["hyenadna", "hyena", "m2bert", "remote"]


@pytest.fixture
def build(tmp_path: Path) -> Callable[[str], PreTrainedModel]:
    def remote() -> PreTrainedModel:
        repo = remote_hyenadna_repo(tmp_path / "remote")
        return AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True).eval()

    families = {"hyenadna": tiny_hyenadna, "hyena": tiny_hyena, "m2bert": tiny_m2bert, "remote": remote}
    return lambda family: families[family]()


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def mask_directly(taps: torch.Tensor, mask: FrequencyMask) -> torch.Tensor:
    """Masks a circular kernel `(n, channels)` by direct sums over the kept cosines and sines, in float64."""
    n = taps.shape[0]
    position = torch.arange(n, dtype=torch.float64)
    result = torch.zeros_like(taps, dtype=torch.float64)
    for f in mask.as_tensor().nonzero().flatten().tolist():
        wave = torch.exp(2j * torch.pi * f * position / n)
        weight = 1 if f in (0, n // 2) else 2
        result += weight / n * (wave[:, None] * (wave.conj() @ taps.to(torch.complex128))).real
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_filters_are_masked_at_full_length(family: str, build: Callable[[str], PreTrainedModel]) -> None:
    model = build(family)
    dense = {name: module.filter(module.pos_emb.z.shape[1])[0] for name, module in find_filters(model).items()}
    reverse = {
        name: module.filter_rev(module.pos_emb.z.shape[1])[0] if family == "m2bert" else torch.zeros_like(dense[name])
        for name, module in find_filters(model).items()
    }
    assert len(dense) == (4 if family == "m2bert" else 2)
    sparsify_model(model, 0.3)
    for name, module in find_filters(model).items():
        length = len(dense[name])
        circle = torch.cat([dense[name], reverse[name].flip(0)]).double().detach()
        expected = mask_directly(circle, module.frequency_mask)
        for cut in (1, 17, length):
            assert relative_l2(module.filter(cut)[0], expected[:cut]) < 1e-5
            if family == "m2bert":
                assert relative_l2(module.filter_rev(cut)[0], expected[length:].flip(0)[:cut]) < 1e-5
        with pytest.raises(SparsityError, match=f"length {length + 1} exceeds the {length} taps"):
            module.filter(length + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_densify_restores_every_bit(family: str, build: Callable[[str], PreTrainedModel]) -> None:
    model = build(family)
    ids = dna_ids()
    before, state = logits(model, ids), {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    config = model.config.to_dict()
    assert sparsify_model(model, 0.3) is model
    assert not torch.equal(logits(model, ids), before)
    assert model.state_dict().keys() == state.keys()
    assert densify_model(model) is model
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert model.config.to_dict() == config
    densify_model(model)
    assert torch.equal(logits(model, ids), before)


def test_keeping_everything_changes_nothing() -> None:
    model = tiny_hyenadna()
    before = logits(model, dna_ids())
    assert relative_l2(logits(sparsify_model(model, 1.0), dna_ids()), before) < 1e-6


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", ["hyenadna", "hyena", "remote"])
def test_no_output_sees_the_future(family: str, patched: bool, build: Callable[[str], PreTrainedModel]) -> None:
    model = build(family).double()
    if patched:
        patch_model(model)
    ids = dna_ids(batch=1, length=128 if family == "hyena" else 130)
    for stage in ("dense", "sparse"):
        if stage == "sparse":
            sparsify_model(model, 0.2)
        before = logits(model, ids)
        for place in (1, 64, 127):
            changed = ids.clone()
            changed[:, place:] = 7 + (changed[:, place:] - 6) % 4
            after = logits(model, changed)
            assert relative_l2(after[:, :place], before[:, :place]) < 1e-6
            assert relative_l2(after[:, place:], before[:, place:]) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_and_unpatched_agree(family: str, build: Callable[[str], PreTrainedModel]) -> None:
    model, ids = build(family), dna_ids()
    dense = logits(model, ids)
    patch_model(model)
    assert relative_l2(logits(model, ids), dense) < 1e-5
    sparsify_model(model, 0.3)
    sparse = logits(model, ids)
    assert relative_l2(sparse, dense) > 1e-3
    unpatch_model(model)
    assert relative_l2(sparse, logits(model, ids)) < 1e-5
    patch_model(model)
    densify_model(model)
    assert relative_l2(logits(model, ids), dense) < 1e-5


def test_keep_is_honoured_over_the_model() -> None:
    report = sparsity_report(sparsify_model(tiny_hyenadna(), 0.3))
    assert 0.3 <= report.density < 0.3 + 1 / 131
    report = sparsity_report(sparsify_model(tiny_hyenadna(), 0.8, by="energy"))
    assert all(0.8 <= row.kept_energy < 0.85 for row in report)
    report = sparsity_report(sparsify_model(tiny_hyenadna(), 40))
    assert [row.kept_bins for row in report] == [40, 40]
    report = sparsity_report(sparsify_model(tiny_hyenadna(), 5, block=10))
    assert [row.kept_bins for row in report] == [50, 50]


def test_one_layer_or_given_masks() -> None:
    model = tiny_hyenadna()
    first, second = find_filters(model)
    sparsify_model(model, 0.5, layers=["*.layers.1.*"])
    assert [row.layer for row in sparsity_report(model)] == [second]
    sparsify_model(model, {first: FrequencyMask.low_pass(260, 20)})
    assert [row.layer for row in sparsity_report(model)] == [first, second]
    assert sparsity_report(model)[0].kept_bins == 20
    densify_model(model)
    assert not sparsity_report(model)
    sparsify_model(model, FrequencyMask.comb(260, 4))
    assert [row.kept_bins for row in sparsity_report(model)] == [33, 33]


def test_calibration_chooses_what_matters_for_the_output() -> None:
    ids = dna_ids(batch=4, length=130)
    model = tiny_hyenadna()
    dense = logits(model, ids)
    by_filter = relative_l2(logits(sparsify_model(model, 0.3, block=4), ids), dense)
    masks = [module.frequency_mask for module in find_filters(model).values()]
    densify_model(model)
    model.train()
    attributes = [set(vars(module)) for module in model.modules()]
    sparsify_model(model, 0.3, block=4, calibration={"input_ids": ids, "labels": ids})
    assert all(module.training for module in model.modules())
    by_output = relative_l2(logits(model.eval(), ids), dense)
    assert [module.frequency_mask for module in find_filters(model).values()] != masks
    assert by_output < by_filter
    assert 0.3 <= sparsity_report(model).density < 0.33
    densify_model(model)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(logits(model, ids), dense)


def test_calibration_of_bidirectional_filters() -> None:
    model, ids = tiny_m2bert(), dna_ids(batch=4, length=128)
    dense = logits(model, ids)
    errors = {}
    for name, calibration in {"filter": None, "output": ids}.items():
        sparsify_model(model, 0.3, calibration=calibration)
        errors[name] = relative_l2(logits(model, ids), dense)
        densify_model(model)
        assert torch.equal(logits(model, ids), dense)
    assert errors["output"] < errors["filter"]


def test_calibration_must_reach_the_filters() -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = (tiny_hyenadna().hyena.backbone.layers[0].mixer for _ in range(2))

        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return self.used(u)

    model = Detour()
    with pytest.raises(SparsityError, match=r"unused\.filter_fn has no effect"):
        sparsify_model(model, 0.5, calibration=torch.randn(1, 20, 16))
    sparsify_model(model, 0.5, layers=["used.*"], calibration=torch.randn(1, 20, 16))
    assert [row.layer for row in sparsity_report(model)] == ["used.filter_fn"]


@pytest.mark.parametrize("family", ["hyenadna", "m2bert"])
def test_report_equals_what_is_measured(family: str, build: Callable[[str], PreTrainedModel]) -> None:
    model, ids = build(family), dna_ids()
    layers = {name.rpartition(".")[0] for name in find_filters(model)}
    seen: dict[str, torch.Tensor] = {}
    dense_model = copy.deepcopy(model)
    sparsify_model(model, 0.3)
    hooks = [
        model.get_submodule(layer).register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[0]}))
        for layer in layers
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    report = sparsity_report(model, ids)
    assert report == sparsity_report(model, {"input_ids": ids})
    assert len(report) == len(find_filters(model))
    noise = sparsity_report(model)
    for row, noise_row in zip(report, noise, strict=True):
        layer, _, filter_name = row.layer.rpartition(".")
        sparse, dense = model.get_submodule(row.layer), dense_model.get_submodule(row.layer)
        length = dense.pos_emb.z.shape[1]
        methods = ["filter", "filter_rev"] if family == "m2bert" else ["filter"]
        taps = torch.cat([getattr(dense, method)(length) for method in methods]).double()
        kept = torch.cat([getattr(sparse, method)(length) for method in methods]).double()
        assert row.filter_error == pytest.approx(relative_l2(kept, taps), rel=1e-4)
        assert row.filter_error**2 == pytest.approx(1 - row.kept_energy - row.cut_energy, rel=1e-3)
        assert (row.cut_energy == 0) == (family == "m2bert")
        assert row.kept_bins == sparse.frequency_mask.kept
        mixer = copy.deepcopy(model.get_submodule(layer))
        after = mixer(seen[layer])
        setattr(mixer, filter_name, dense)
        before = mixer(seen[layer])
        if family == "m2bert":
            after, before = after[0], before[0]
        assert row.output_error == pytest.approx(relative_l2(after, before), rel=1e-4)
        assert 0 < noise_row.output_error != row.output_error


def test_report_prints_and_serialises() -> None:
    model = tiny_hyenadna()
    assert str(sparsity_report(model)) == "no sparse filters"
    assert sparsity_report(model).to_dict() == {"density": 1.0, "filters": []}
    report = sparsity_report(sparsify_model(model, 0.25))
    assert json.loads(json.dumps(report.to_dict()))["filters"][1]["layer"] == report[1].layer
    header, *rows = str(report).splitlines()
    assert "output error" in header and len(rows) == 2 and f"{report[0].output_error:.2e}" in rows[0]
    assert all(row.kept_bins == int(line.split()[1].split("/")[0]) for row, line in zip(report, rows, strict=True))
    assert report.to_markdown().count("\n|") == 3
    assert f"kept_bins={report[0].kept_bins}/131" in repr(model)


@pytest.mark.parametrize("family", ["hyenadna", "m2bert"])
def test_gradients_reach_the_filter_network(family: str, build: Callable[[str], PreTrainedModel]) -> None:
    model = sparsify_model(build(family).double(), 0.3)
    module = next(iter(find_filters(model).values()))
    weight = module.implicit_filter[0].weight
    loss = (module.filter(20) ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    step = torch.randn_like(weight)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight.add_(step, alpha=sign * 1e-6)
            values.append((module.filter(20) ** 2).sum())
            weight.add_(step, alpha=-sign * 1e-6)
    assert float((gradient * step).sum()) == pytest.approx(float(values[0] - values[1]) / 2e-6, rel=1e-5)


def test_low_precision_and_copies() -> None:
    model = sparsify_model(tiny_hyenadna(), 0.3)
    expected = logits(model, dna_ids())
    assert torch.equal(logits(copy.deepcopy(model), dna_ids()), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert all(module.filter(5).dtype == torch.bfloat16 for module in find_filters(half).values())
    assert relative_l2(logits(half, dna_ids()), expected) < 0.2
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_l2(logits(model, dna_ids()), expected) < 0.2


def test_compiles_without_graph_breaks() -> None:
    model = sparsify_model(tiny_hyenadna(), 0.3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_l2(logits(compiled, dna_ids()), logits(model, dna_ids())) < 1e-6
    densify_model(compiled)
    assert not sparsity_report(model)


class NotALongConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        (0, {}, "got 0"),
        (0.0, {}, "got 0.0"),
        (1.1, {}, "got 1.1"),
        (1000, {}, "from 1 to 131, got 1000"),
        ("half", {}, "'half'"),
        (0.5, {"by": "taps"}, "'taps'"),
        (0.5, {"block": 0}, "got 0"),
        (0.5, {"layers": []}, "at least one"),
        (0.5, {"layers": "*"}, "list"),
        (0.5, {"layers": ["*.layers.7.*"]}, "layers.7"),
        (FrequencyMask.low_pass(256, 9), {}, "130 taps and needs a mask of fft_size 260, got 256"),
        ({"hyena.nowhere": FrequencyMask.low_pass(260, 9)}, {}, "hyena.nowhere"),
        ({}, {}, "at least one"),
    ],
)
def test_bad_patterns_leave_the_model_alone(pattern: object, options: dict, message: str) -> None:
    model = tiny_hyenadna()
    before = logits(model, dna_ids())
    with pytest.raises(SparsityError, match=message.replace(".", r"\.").replace("*", r"\*")):
        sparsify_model(model, pattern, **options)
    assert not sparsity_report(model)
    assert getattr(model, "hf_quantizer", None) is None
    assert torch.equal(logits(model, dna_ids()), before)


def test_bad_models_are_refused() -> None:
    with pytest.raises(SparsityError, match="NotALongConvolution has no filters"):
        sparsify_model(NotALongConvolution(), 0.5)
    model = sparsify_model(tiny_hyenadna(), 0.5, layers=["*.1.*"])
    before = logits(model, dna_ids())
    with pytest.raises(SparsityError, match=r"layers\.1\.mixer\.filter_fn is sparse already"):
        sparsify_model(model, 0.25)
    assert len(sparsity_report(model)) == 1
    assert torch.equal(logits(model, dna_ids()), before)
    broken = tiny_hyenadna()
    with torch.no_grad():
        find_filters(broken).popitem()[1].implicit_filter[0].weight.fill_(torch.nan)
    with pytest.raises(SparsityError, match=r"layers\.1\.mixer\.filter_fn: .*NaN"):
        sparsify_model(broken, 0.5)
    several = tiny_hyenadna()
    module = find_filters(several).popitem()[1]
    module.__class__ = type("HyenaFilter", (type(module),), {"filter": lambda self, length: (None, None)})
    with pytest.raises(SparsityError, match=r"one tensor of shape \(1, length, channels\), got tuple"):
        sparsify_model(several, 0.5)
    foreign = tiny_hyenadna()
    foreign.hf_quantizer = type("Q", (), {"quantization_config": type("C", (), {"quant_method": "gptq"})})()
    with pytest.raises(SparsityError, match="quantised with gptq"):
        sparsify_model(foreign, 0.5)


def test_a_failure_halfway_rolls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_flashfftconv.sparsity import planning

    model = tiny_hyenadna()
    done = []

    def fail_on_second(module: nn.Module, mask: FrequencyMask, put: Callable = planning.make_sparse) -> None:
        if done:
            raise MemoryError
        put(module, mask)
        done.append(module)

    monkeypatch.setattr(planning, "make_sparse", fail_on_second)
    with pytest.raises(MemoryError):
        sparsify_model(model, 0.5)
    assert done and not sparsity_report(model)


def test_plain_modules_and_wrappers() -> None:
    mixer = nn.Sequential(tiny_hyenadna().hyena.backbone.layers[0].mixer)
    sparsify_model(mixer, 0.5)
    assert [row.layer for row in sparsity_report(mixer)] == ["0.filter_fn"]
    densify_model(mixer)
    assert not sparsity_report(mixer)
    model = tiny_hyenadna()
    sparsify_model(nn.DataParallel(model), 0.5)
    assert len(sparsity_report(model)) == 2
