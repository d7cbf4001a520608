"""Patched models in 16 bits: under autocast, with narrow weights, and with the filters kept in float32."""

import copy
import re

import pytest
import torch
from family_models import FAMILIES, Family, families, logits, mixers
from patching import relative, snapshot
from remote_style import HyenaFilter
from torch import nn

from hf_flashfftconv.errors import PatchError
from hf_flashfftconv.patch import patch_model, unpatch_model

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("transforms_pay")]

# Rounding falls differently in patched models: over this many positions the error still varies by some per cent.
BATCH, LENGTH, NOISE = 12, 60, 1.1
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def error(model: nn.Module, exact: torch.Tensor) -> float:
    with torch.no_grad():
        return relative(logits(model, LENGTH, BATCH), exact)


def exact_logits(family: Family) -> torch.Tensor:
    with torch.no_grad():
        return logits(family.make(), LENGTH, BATCH)


@families()
@both_dtypes
def test_autocast_is_no_less_accurate_than_unpatched(family: Family, dtype: torch.dtype) -> None:
    model, exact = family.make(), exact_logits(family)
    patched = patch_model(copy.deepcopy(model))
    with torch.autocast("cpu", dtype):
        assert logits(patched).dtype == logits(model).dtype
        assert error(patched, exact) <= NOISE * error(model, exact)


@families(lambda family: family.narrow or family.filters == "filter_fn")
@both_dtypes
def test_16_bit_weights_are_no_less_accurate_than_unpatched(family: Family, dtype: torch.dtype) -> None:
    model, exact = family.make().to(dtype), exact_logits(family)
    patched = patch_model(copy.deepcopy(model))
    if not family.narrow:
        with pytest.raises(RuntimeError, match="Unsupported dtype"):
            logits(model)
        # Compared with the code that later revisions have.
        for part in model.modules():
            if isinstance(part, HyenaFilter):
                part.float32 = True
    assert logits(patched).dtype == logits(model).dtype
    assert error(patched, exact) <= NOISE * error(model, exact)


@families()
@both_dtypes
def test_float32_filters_stay_when_the_model_is_converted(family: Family, dtype: torch.dtype) -> None:
    model = patch_model(family.make(), float32_filters=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert model.to(dtype) is model
    for name, parameter in model.named_parameters():
        wide = re.search(family.filters, name)
        assert parameter.dtype == (torch.float32 if wide else dtype), name
        assert not wide or torch.equal(parameter, before[name]), name
    logits(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name
    # As far from float32 as the rounding of the other weights and of all activations brings it, and no further.
    rounded = family.make()
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if not re.search(family.filters, name):
                parameter.copy_(parameter.to(dtype))
    with torch.autocast("cpu", dtype):
        reference = error(patch_model(rounded, float32_filters=True), exact_logits(family))
    assert error(model, exact_logits(family)) <= 1.5 * reference
    assert logits(unpatch_model(model.float())).dtype == torch.float32


@families()
@both_dtypes
def test_float32_filters_in_a_16_bit_model(family: Family, dtype: torch.dtype) -> None:
    narrow, exact = family.make().to(dtype), exact_logits(family)
    before = snapshot(narrow)
    model = patch_model(narrow, float32_filters=True)
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {name for name, _ in model.named_parameters() if re.search(family.filters, name)}
    logits(model).square().mean().backward()
    assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in model.parameters())
    model.zero_grad()
    if family.narrow:
        rounded = patch_model(family.make().to(dtype))
        assert error(model, exact) <= NOISE * error(rounded, exact)
        assert torch.equal(logits(patch_model(model)), logits(rounded))
    unpatch_model(patch_model(model, float32_filters=True))
    assert snapshot(model) == before


def taps(model: nn.Module) -> torch.Tensor:
    mixer = mixers(model)[0]
    return mixer.generate(mixer.filter_modules()[0], LENGTH, False)[0]


@pytest.mark.parametrize("name", ["hyenadna", "m2"])
def test_float32_filters_are_nearer_to_those_of_the_float32_model(name: str) -> None:
    family = FAMILIES[name]
    exact = taps(patch_model(family.make()))
    rounded = patch_model(family.make().bfloat16())
    assert relative(taps(patch_model(rounded, float32_filters=True)), exact) < 0.9 * relative(
        taps(patch_model(family.make().bfloat16())), exact
    )
    exact = exact_logits(family)
    model = patch_model(family.make())
    with torch.autocast("cpu", torch.bfloat16):
        rounded_error = error(model, exact)
        assert error(patch_model(model, float32_filters=True), exact) < 0.5 * rounded_error


def test_float32_filters_need_weights_and_leave_trained_tables_alone() -> None:
    model = FAMILIES["hyenadna"].make().to("meta")
    with pytest.raises(PatchError, match=r"layers.0.mixer are on the meta device"):
        patch_model(model, float32_filters=True)
    assert not mixers(model)
    model = FAMILIES["m2"].make().bfloat16()
    table = model.attention[0].filter_fn.pos_emb.z
    with torch.no_grad():
        table[0, 5, 1] += 0.05
    patch_model(model, float32_filters=True)
    assert torch.equal(table, table.bfloat16().float())
    positions = model.attention[0].filter_fn.pos_emb.t
    assert len(positions.unique()) == 66 and not torch.equal(positions, positions.bfloat16().float())
