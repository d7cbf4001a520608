"""Patched models under DistributedDataParallel and fully_shard, on two processes of one machine."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from family_models import family_model
from patching import relative
from remote_style import BertConfig, BertForMaskedLM, HyenaConfig, HyenaDNAForCausalLM, build
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_flashfftconv.adapters.swap import is_patched
from hf_flashfftconv.errors import PatchError
from hf_flashfftconv.patch import patch_model, patch_report, unpatch_model

MODELS = {"hyenadna": (HyenaDNAForCausalLM, HyenaConfig), "m2": (BertForMaskedLM, BertConfig)}


def make(name: str) -> nn.Module:
    if name not in MODELS:
        return family_model(name).train()
    model_class, config_class = MODELS[name]
    return build(model_class, config_class()).train()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def losses_and_gradients(wrapped: nn.Module, inner: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(7, 11, (2, 40), generator=generator)
    loss = wrapped(ids).logits.square().mean()
    loss.backward()
    return loss.detach(), {name: full(p.grad).clone() for name, p in inner.named_parameters()}


def check(patched: nn.Module, inner: nn.Module, reference: nn.Module) -> None:
    loss, gradients = losses_and_gradients(patched, inner)
    expected, expected_gradients = losses_and_gradients(DistributedDataParallel(reference), reference)
    assert relative(loss, expected) <= 1e-5
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) <= 1e-5, name


def data_parallel(name: str) -> None:
    for patch_first in (True, False):
        model = make(name)
        if patch_first:
            patch_model(model)
        wrapped = DistributedDataParallel(model)
        assert patch_model(wrapped) is wrapped
        assert [row.name for row in patch_report(wrapped).rows] == [row.name for row in patch_report(model).rows]
        check(wrapped, model, make(name))


def sharded(name: str) -> None:
    for patch_first in (True, False):
        model = make(name)
        if patch_first:
            patch_model(model)
        blocks = model.attention if name == "m2" else model.layers
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
        patch_model(model)
        assert patch_report(model).replaced == 2
        check(model, model, make(name))
        check_nothing_is_kept(model, make(name))
    if name == "m2":
        # Here the mixers themselves are sharded: their classes, generated after ours, go first.
        outer = patch_model(make(name))
        fully_shard(outer.attention[0])
        with pytest.raises(PatchError, match=r"attention\.0 has the class FSDP"):
            unpatch_model(outer)
        assert patch_report(outer).replaced == 2
    unpatch_model(model)
    assert patch_report(model).replaced == 0
    assert isinstance(model, FSDPModule)


def check_nothing_is_kept(model: nn.Module, reference: nn.Module) -> None:
    """Filters of sharded weights are never reused: gathering leaves no trace of a change."""
    ids = torch.full((1, 20), 7)
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
        for parameter in (*model.parameters(), *reference.parameters()):
            parameter.add_(0.1)
        assert relative(model(ids).logits, before) > 1e-3
        assert not any(module._flashfftconv.cache._entries for module in model.modules() if is_patched(module))
        assert relative(model(ids).logits, reference.eval()(ids).logits) <= 1e-5


def run(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for name in (*MODELS, "stripedhyena", "s4d"):
            data_parallel(name)
            sharded(name)
    finally:
        dist.destroy_process_group()


def test_two_processes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run, (port,), nprocs=2)
