"""Patched models under DistributedDataParallel and fully_shard, on two processes of one machine."""

import pytest
import torch
import torch.distributed as dist
from family_models import FAMILIES
from patching import relative
from process_group import free_port, process_group
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_flashfftconv.adapters import evo2
from hf_flashfftconv.adapters.swap import is_patched
from hf_flashfftconv.errors import PatchError
from hf_flashfftconv.patch import patch_model, patch_report, unpatch_model


def make(name: str) -> nn.Module:
    return FAMILIES[name].make().train()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


def loss_and_gradients(wrapped: nn.Module, inner: nn.Module) -> Result:
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(7, 11, (2, 40), generator=generator)
    loss = wrapped(ids).logits.square().mean()
    loss.backward()
    trained = ((name, p.grad) for name, p in inner.named_parameters() if p.grad is not None)
    return loss.detach(), {name: full(gradient).clone() for name, gradient in trained}


def check(patched: nn.Module, inner: nn.Module, expected: Result) -> None:
    loss, gradients = loss_and_gradients(patched, inner)
    expected_loss, expected_gradients = expected
    assert relative(loss, expected_loss) <= 1e-5
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) <= 1e-5, name


def data_parallel(name: str, expected: Result) -> None:
    for patch_first in (True, False):
        model = make(name)
        if patch_first:
            patch_model(model)
        wrapped = DistributedDataParallel(model)
        assert patch_model(wrapped) is wrapped
        assert [row.name for row in patch_report(wrapped).rows] == [row.name for row in patch_report(model).rows]
        check(wrapped, model, expected)


def sharded(name: str, expected: Result) -> None:
    for patch_first in (True, False):
        model = make(name)
        if patch_first:
            patch_model(model)
        for row in patch_report(model).rows:
            # M2's mixers themselves, in all other models the blocks that they are in.
            fully_shard(model.get_submodule(row.name if name == "m2" else row.name.rpartition(".")[0]))
        fully_shard(model)
        patch_model(model)
        assert patch_report(model).replaced == 2
        check(model, model, expected)
        check_nothing_is_kept(model, make(name))
    if name == "m2":
        # Where the mixers themselves are sharded, their classes, generated after ours, go first.
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
    with process_group(rank, 2, port):
        evo2.use_kernels = lambda *_: True  # As `transforms_pay`, in a process of its own.
        for name in FAMILIES:
            reference = make(name)
            expected = loss_and_gradients(DistributedDataParallel(reference), reference)
            data_parallel(name, expected)
            sharded(name, expected)


def test_two_processes() -> None:
    torch.multiprocessing.spawn(run, (free_port(),), nprocs=2)
