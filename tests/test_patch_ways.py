"""Patched models in the ways that models are really used: adapters, offloading, replicas, checkpointing, generation."""

import copy
import re
from pathlib import Path
from types import MethodType

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from family_models import FAMILIES, Family, families, generation_state, logits, mixers
from model_factory import dna_ids
from patching import assert_equal_models, relative, snapshot
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_flashfftconv.patch import patch_model, patch_report, unpatch_model
from hf_flashfftconv.sparsity import densify_model, sparsify_model

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("transforms_pay")]

SPARSE = [FAMILIES[name] for name in ("native-hyenadna", "native-m2", "hyenadna", "m2")]
implicit = pytest.mark.parametrize("family", SPARSE, ids=["native-hyenadna", "native-m2", "hyenadna", "m2"])
either_order = pytest.mark.parametrize("patch_first", [True, False], ids=["patch-first", "patch-last"])


@families()
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family: Family, reentrant: bool) -> None:
    model = family.make().train()
    patched = patch_model(copy.deepcopy(model))
    patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        patched.enable_input_require_grads()
    assert_equal_models(patched, model, logits)


def with_lora(model: nn.Module) -> nn.Module:
    """Adapters on all layers of the mixers' projections and filter networks, and on filters that are matrices."""

    def adaptable(name: str, layer: nn.Module) -> bool:
        linear = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv1d) and layer.groups == 1)
        # H3 multiplies by the weights of three of its projections itself, which leaves adapters out.
        return linear and re.search("mixer|attention|_proj", name) is not None and not re.search("[qkv]_proj", name)

    modules = [name for name, layer in model.named_modules() if adaptable(name, layer)]
    own = [name for name, p in model.named_parameters() if re.search(r"mixer\.(filter|M_filters|residues)$", name)]
    own = [name for name in own if model.get_parameter(name).dim() == 2]
    config = LoraConfig(r=4, target_modules=modules, target_parameters=own or None, init_lora_weights=False)
    return get_peft_model(model, config).eval()


@families()
@either_order
def test_lora_on_projections_and_filters(family: Family, patch_first: bool) -> None:
    torch.manual_seed(3)
    reference = with_lora(family.make())
    model = family.make()
    if patch_first:
        patch_model(model)
    torch.manual_seed(3)
    model = with_lora(model)
    if not patch_first:
        assert patch_model(model) is model
    assert patch_report(model).replaced == 2
    assert_equal_models(model, reference, logits)
    assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if "lora_A" in name)
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


@families(lambda family: family.offloads)
@either_order
def test_cpu_offload(family: Family, patch_first: bool) -> None:
    model = family.make()
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


@families(lambda family: family.offloads)
@either_order
def test_device_map_with_a_block_on_disk(family: Family, patch_first: bool, tmp_path: Path) -> None:
    model = family.make()
    expected = logits(model)
    if patch_first:
        patch_model(model)
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in blocks_of(model)]
    names = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    others = {name for name in names if not name.startswith(tuple(blocks))}
    device_map = {name: "cpu" for name in [*blocks[:-1], *others]} | {blocks[-1]: "disk"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    patch_model(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    with torch.no_grad():
        assert relative(logits(model), expected) <= 1e-5
    assert all(mixer._flashfftconv.last is not None for mixer in mixers(model))


def blocks_of(model: nn.Module) -> set[str]:
    """What must stay on one device, under the names of patched classes too."""
    return {name for block in model._no_split_modules for name in (block, f"FlashFFT{block}")}


@families()
def test_data_parallel(family: Family) -> None:
    model = family.make()
    expected = logits(model)
    parallel = nn.DataParallel(model)
    assert patch_model(parallel) is parallel
    assert patch_report(parallel).rows == patch_report(model).rows and patch_report(model).replaced == 2
    assert relative(logits(parallel), expected) <= 1e-5
    logits(replicate(model)).sum().backward()
    trained = [p for mixer in mixers(model) for p in mixer.parameters() if p.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)
    with torch.no_grad():
        assert relative(logits(replicate(model)), expected) <= 1e-5
    # A replica lives for one call: nothing of it may stay.
    assert not mixers(model)[0]._flashfftconv.cache._entries
    assert torch.equal(logits(unpatch_model(parallel)), expected)


def replicate(module: nn.Module) -> nn.Module:
    """A replica as nn.DataParallel makes them for several GPUs, whose parameters are plain tensors."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.clone())
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate(child)
    return replica


@families()
def test_meta_weights_are_patched_and_materialised_later(family: Family) -> None:
    model, state = family.make().to("meta"), family.make().state_dict()
    assert patch_report(patch_model(model)).replaced == 2
    model.to_empty(device="cpu").load_state_dict(state)
    assert relative(logits(model), logits(family.make())) <= 1e-5


@families()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family: Family, side: str) -> None:
    model = family.make()
    ids = dna_ids(length=40)
    ids[0, :9] = ids[1, :5] = 4
    ids = ids if side == "left" else ids.flip(1)
    expected = model(ids).logits
    patch_model(model)
    assert relative(model(ids).logits, expected) <= 1e-5
    if side == "right" and family.causal:
        assert relative(model(ids[:1, :31]).logits, expected[:1, :31]) <= 1e-5


@families(lambda family: family.decodes)
def test_greedy_generation(family: Family) -> None:
    model, prompt = family.make(), dna_ids(length=10)
    expected = greedy(model, prompt)
    assert torch.equal(greedy(patch_model(model), prompt), expected)
    assert len(set(expected[:, 10:].flatten().tolist())) > 1


def greedy(model: nn.Module, ids: torch.Tensor, steps: int = 8) -> torch.Tensor:
    """By `generate`, or by the loop that users of remote code without it write; always without a cache."""
    if model.can_generate():
        return model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, use_cache=False)
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@families(lambda family: family.stateful)
def test_generation_with_a_state(family: Family) -> None:
    model = family.make()
    with torch.no_grad():
        whole = logits(model, 24)
        for step in (model, patch_model(copy.deepcopy(model))):
            state, ids = generation_state(), dna_ids(length=24)
            parts = [step(ids[:, :15], inference_params=state).logits]
            parts += [step(ids[:, i : i + 1], inference_params=state).logits for i in range(15, 24)]
            assert relative(torch.cat(parts, dim=1), whole) <= 1e-5


@families()
def test_forward_bound_to_the_instance_follows(family: Family) -> None:
    # What `kernelize` and the removal of a hook leave behind: the forward of the class, bound to the instance.
    model = family.make()
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


@implicit
def test_hooks_on_and_in_the_mixer_still_run(family: Family) -> None:
    model = patch_model(family.make())
    calls: list[str] = []
    mixer = mixers(model)[0]
    for name, module in mixer.named_children():
        if name not in ("filter_fn", "filter_fn2", "dropout"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    mixer.register_forward_hook(lambda *_: calls.append("mixer"))
    logits(model)
    assert len(calls) == 4 and calls[-1] == "mixer"


@implicit
def test_hooks_put_on_a_filter_later_bring_the_original_back(family: Family) -> None:
    model = patch_model(family.make())
    expected = logits(model)
    calls = []
    handle = mixers(model)[0].filter_fn.register_forward_hook(lambda *_: calls.append(1))
    assert relative(logits(model), expected) <= 1e-5
    assert calls == [1]
    assert ["hooks on the filter" in row.reason for row in patch_report(model).rows] == [True, False]
    handle.remove()
    assert torch.equal(logits(model), expected) and calls == [1]
    assert not any(row.reason for row in patch_report(model).rows)


@implicit
def test_sparse_filters(family: Family) -> None:
    dense, sparse = family.make(), sparsify_model(family.make(), 0.25)
    assert_equal_models(patch_model(sparsify_model(family.make(), 0.25)), sparse, logits)
    model = patch_model(family.make())
    with torch.no_grad():
        logits(model)
        sparsify_model(model, 0.25)
        assert relative(logits(model), logits(sparse)) <= 1e-5
        unpatch_model(densify_model(model))
        assert torch.equal(logits(model), logits(dense))
