"""Patched models in the ways that models are really used."""

import copy
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from family_models import MIXERS, family_model
from model_factory import dna_ids, tiny_hyenadna, tiny_m2bert
from patching import assert_equal_models, relative, snapshot
from peft import LoraConfig, get_peft_model
from remote_style import BertConfig, BertForMaskedLM, HyenaConfig, HyenaDNAForCausalLM, build
from torch import nn

from hf_flashfftconv.adapters.swap import is_patched
from hf_flashfftconv.errors import PatchError
from hf_flashfftconv.patch import patch_model, patch_report, unpatch_model
from hf_flashfftconv.sparsity import densify_model, sparsify_model

MODELS = {
    "hyenadna": tiny_hyenadna,
    "m2bert": tiny_m2bert,
    "remote-hyenadna": lambda: build(HyenaDNAForCausalLM, HyenaConfig()),
    "remote-m2": lambda: build(BertForMaskedLM, BertConfig()),
}
FAMILIES = {name: lambda name=name: family_model(name) for name in MIXERS}
# Reads the weights of its projections past their hooks.
OFFLOADABLE = MODELS | {name: make for name, make in FAMILIES.items() if name != "h3"}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
every_family = pytest.mark.parametrize("make", (MODELS | FAMILIES).values(), ids=MODELS | FAMILIES)
Maker = Callable[[], nn.Module]


def logits(model: nn.Module) -> torch.Tensor:
    return model(dna_ids()).logits


def mixers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_patched(module)]


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_no_less_accurate_than_unpatched(make: Maker, dtype: torch.dtype) -> None:
    model = make()
    exact = logits(model)
    with torch.autocast("cpu", dtype):
        unpatched = logits(model)
        patched = logits(patch_model(copy.deepcopy(model)))
    assert patched.dtype == unpatched.dtype
    assert relative(patched, exact) <= 1.1 * relative(unpatched, exact)


@pytest.mark.parametrize("make", [tiny_hyenadna, MODELS["remote-hyenadna"], FAMILIES["fla"], FAMILIES["stripedhyena"]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_no_less_accurate_than_unpatched(make: Maker, dtype: torch.dtype) -> None:
    model = make()
    exact = logits(model)
    model.to(dtype)
    unpatched = logits(model)
    patched = logits(patch_model(model))
    assert patched.dtype == unpatched.dtype
    assert relative(patched, exact) <= 1.1 * relative(unpatched, exact)


def taps(model: nn.Module) -> torch.Tensor:
    name = patch_report(model).rows[0].name
    return model.get_submodule(name).filter_fn.filter(60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [MODELS["remote-hyenadna"], MODELS["remote-m2"]])
def test_float32_filters_stay_when_the_model_is_converted(make: Maker, dtype: torch.dtype) -> None:
    model = patch_model(make(), float32_filters=True)
    exact = taps(model)
    logits(model).sum().backward()
    assert model.to(dtype) is model
    assert torch.equal(taps(model), exact)
    assert all(parameter.grad.dtype == parameter.dtype for parameter in model.parameters())
    assert {p.dtype for name, p in model.named_parameters() if "filter_fn" not in name} == {dtype}
    assert logits(unpatch_model(model.float())).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [MODELS["remote-hyenadna"], MODELS["remote-m2"]])
def test_float32_filters_in_a_16_bit_model(make: Maker, dtype: torch.dtype) -> None:
    exact = logits(make())
    narrow = make().to(dtype)
    before = snapshot(narrow)
    rounded = patch_model(make().to(dtype))
    model = patch_model(narrow, float32_filters=True)
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "filter_fn" in name}
    assert dtypes == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "filter_fn" not in name} == {dtype}
    assert relative(taps(model), taps(make())) < 0.9 * relative(taps(rounded), taps(make()))
    assert relative(logits(model), exact) <= 1.1 * relative(logits(rounded), exact)
    logits(model).float().square().mean().backward()
    assert all(parameter.grad.dtype == parameter.dtype for parameter in model.parameters())
    model.zero_grad()
    patch_model(model)
    assert torch.equal(logits(model), logits(rounded))
    unpatch_model(patch_model(model, float32_filters=True))
    assert snapshot(model) == before


def test_float32_filters_under_autocast() -> None:
    model = MODELS["remote-hyenadna"]()
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = relative(logits(patch_model(model)), exact)
        assert relative(logits(patch_model(model, float32_filters=True)), exact) < 0.5 * rounded


def test_float32_filters_need_weights_and_leave_trained_tables_alone() -> None:
    model = MODELS["remote-hyenadna"]().to("meta")
    with pytest.raises(PatchError, match=r"layers.0.mixer are on the meta device"):
        patch_model(model, float32_filters=True)
    assert not mixers(model)
    model = MODELS["remote-m2"]().bfloat16()
    table = model.attention[0].filter_fn.pos_emb.z
    with torch.no_grad():
        table[0, 5, 1] += 0.05
    patch_model(model, float32_filters=True)
    assert torch.equal(table, table.bfloat16().float())
    positions = model.attention[0].filter_fn.pos_emb.t
    assert len(positions.unique()) == 66 and not torch.equal(positions, positions.bfloat16().float())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [tiny_hyenadna, MODELS["remote-hyenadna"], *FAMILIES.values()])
def test_gradient_checkpointing(make: Maker, reentrant: bool) -> None:
    model = make().train()
    patched = patch_model(copy.deepcopy(model))
    patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        patched.enable_input_require_grads()
    assert_equal_models(patched, model, logits)


LORA = r".*(in_proj|out_proj|in_linear|out_linear|implicit_filter\.0|implicit_filter\.2)"


def with_lora(model: nn.Module) -> nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=LORA, init_lora_weights=False))
    return adapted.eval()


@every_family
@pytest.mark.parametrize("patch_first", [True, False])
def test_lora_on_projections_and_filters(make: Maker, patch_first: bool) -> None:
    torch.manual_seed(3)
    reference = with_lora(make())
    model = make()
    if patch_first:
        patch_model(model)
    torch.manual_seed(3)
    model = with_lora(model)
    if not patch_first:
        assert patch_model(model) is model
    assert patch_report(model).replaced == 2
    assert_equal_models(model, reference, logits)
    with torch.no_grad():
        for switch in ("disable_adapter_layers", "enable_adapter_layers"):
            logits(model)
            getattr(reference.base_model, switch)()
            getattr(model.base_model, switch)()
            assert relative(logits(model), logits(reference)) <= 1e-5
        logits(model)
        merged, expected = model.merge_and_unload(), reference.merge_and_unload()
        assert relative(logits(merged), logits(expected)) <= 1e-5
    unpatch_model(merged)
    assert torch.equal(logits(merged), logits(expected))


@pytest.mark.parametrize("make", OFFLOADABLE.values(), ids=OFFLOADABLE)
@pytest.mark.parametrize("patch_first", [True, False])
def test_cpu_offload(make: Maker, patch_first: bool) -> None:
    model = make()
    expected = logits(model)
    if patch_first:
        patch_model(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    if not patch_first:
        patch_model(model)
    assert all(parameter.is_meta for parameter in mixers(model)[0].parameters())
    with torch.no_grad():
        for _ in range(2):
            assert relative(logits(model), expected) <= 1e-5
    # The patched code ran, behind the hooks of accelerate.
    assert all(mixer._flashfftconv.last is not None for mixer in mixers(model))
    if patch_first:
        unpatch_model(model)
        remove_hook_from_module(model, recurse=True)
    else:
        remove_hook_from_module(model, recurse=True)
        unpatch_model(model)
    assert torch.equal(logits(model), expected)
    assert not mixers(model)


def test_device_map() -> None:
    model = tiny_hyenadna()
    expected = logits(model)
    dispatch_model(patch_model(model), device_map={"": "cpu"}, force_hooks=True)
    assert relative(logits(model), expected) <= 1e-5


@every_family
def test_forward_bound_to_the_instance_follows(make: Maker) -> None:
    # What `kernelize` and the removal of a hook leave behind: the forward of the class, bound to the instance.
    model = make()
    expected, before = logits(model), snapshot(model)
    names = [row.name for row in patch_report(model).rows]

    def bind() -> None:
        for mixer in map(model.get_submodule, names):
            mixer.forward = MethodType(type(mixer).forward, mixer)

    bind()
    patch_model(model)
    assert relative(logits(model), expected) <= 1e-5
    bind()
    assert relative(logits(model), expected) <= 1e-5
    assert all(mixer._flashfftconv.last is not None for mixer in mixers(model))
    unpatch_model(model)
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)


@every_model
def test_hooks_on_and_in_the_mixer_still_run(make: Maker) -> None:
    model = patch_model(make())
    calls: list[str] = []
    mixer = mixers(model)[0]
    for name, module in mixer.named_children():
        if name not in ("filter_fn", "filter_fn2", "dropout"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    mixer.register_forward_hook(lambda *_: calls.append("mixer"))
    logits(model)
    assert len(calls) == 4 and calls[-1] == "mixer"


@every_model
def test_hooks_put_on_a_filter_later_bring_the_original_back(make: Maker) -> None:
    model = patch_model(make())
    expected = logits(model)
    calls = []
    handle = mixers(model)[0].filter_fn.register_forward_hook(lambda *_: calls.append(1))
    assert relative(logits(model), expected) <= 1e-5
    assert calls == [1]
    assert ["hooks on the filter" in row.reason for row in patch_report(model).rows] == [True, False]
    handle.remove()
    assert torch.equal(logits(model), expected) and calls == [1]
    assert not any(row.reason for row in patch_report(model).rows)


def replicate(module: nn.Module) -> nn.Module:
    """A replica as nn.DataParallel makes them, whose parameters are plain tensors."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.clone())
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate(child)
    return replica


@every_family
def test_data_parallel_replicas(make: Maker) -> None:
    model = make()
    expected = logits(model)
    patch_model(model)
    loss = logits(replicate(model)).sum()
    loss.backward()
    assert all(parameter.grad is not None for mixer in mixers(model) for parameter in mixer.parameters())
    with torch.no_grad():
        assert relative(logits(replicate(model)), expected) <= 1e-5
    # A replica lives for one call: nothing of it may stay.
    assert not mixers(model)[0]._flashfftconv.cache._entries


@every_model
def test_sparse_filters(make: Maker) -> None:
    dense, sparse = make(), sparsify_model(make(), 0.25)
    assert_equal_models(patch_model(sparsify_model(make(), 0.25)), sparse, logits)
    model = patch_model(make())
    with torch.no_grad():
        logits(model)
        sparsify_model(model, 0.25)
        assert relative(logits(model), logits(sparse)) <= 1e-5
        unpatch_model(densify_model(model))
        assert torch.equal(logits(model), logits(dense))


def test_data_parallel_wrapper() -> None:
    model = tiny_hyenadna()
    expected = logits(model)
    parallel = nn.DataParallel(model)
    patch_model(parallel)
    assert patch_report(parallel).rows[0].name == "hyena.backbone.layers.0.mixer"
    assert relative(logits(parallel), expected) <= 1e-5
    unpatch_model(parallel)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    model = tiny_hyenadna()
    ids = dna_ids(length=40)
    ids[0, :9] = ids[1, -5:] = model.config.pad_token_id
    expected = model(ids if side == "left" else ids.flip(1)).logits
    assert relative(patch_model(model)(ids if side == "left" else ids.flip(1)).logits, expected) <= 1e-5


def test_generate() -> None:
    model = tiny_hyenadna()
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(dna_ids(length=10), **options)
    assert torch.equal(patch_model(model).generate(dna_ids(length=10), **options), expected)


@every_family
def test_meta_weights_are_patched_and_materialised_later(make: Maker) -> None:
    model = make()
    expected, state = logits(model), model.state_dict()
    model.to("meta")
    patch_model(model)
    assert patch_report(model).rows[0].status == "replaced"
    model.to_empty(device="cpu").load_state_dict(state)
    assert relative(logits(model), expected) <= 1e-5
