"""Sequences sharded over four processes, as two of two slices each or as one of four, against one process."""

import copy
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_factory import dna_ids, tiny_hyena, tiny_hyenadna, tiny_hyenadna_classifier, tiny_m2bert
from patching import relative
from peft import LoraConfig, get_peft_model
from process_group import free_port, process_group
from remote_style import BertConfig, BertForMaskedLM, HyenaConfig, HyenaDNAForCausalLM, build
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_flashfftconv import fft_conv, shard_sequence, unpatch_model
from hf_flashfftconv.errors import PatchError
from hf_flashfftconv.patch import patch_model, patch_report
from hf_flashfftconv.sequences import (
    average_gradients,
    causal_lm_loss,
    disable_long_sequences,
    enable_long_sequences,
    sharded_fft_conv,
    split_sequence,
    unshard_sequence,
)
from hf_flashfftconv.sparsity import sparsify_model

RANKS = 4
TOLERANCE = 1e-5
LENGTH = 60
Maker = Callable[[], nn.Module]


def remote_hyenadna() -> nn.Module:
    return build(HyenaDNAForCausalLM, HyenaConfig())


def lora() -> nn.Module:
    config = LoraConfig(target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(tiny_hyenadna(), config)


def sparse() -> nn.Module:
    return sparsify_model(tiny_hyenadna(), 0.25)


def cut() -> nn.Module:
    return patch_model(tiny_hyenadna(), filter_length=24, taper=0.25)


def wide_m2() -> nn.Module:
    """The whole sequence is longer than a slice's table of positions would allow."""
    return tiny_m2bert(max_position_embeddings=LENGTH)


NATIVE = [tiny_hyenadna, tiny_hyena, tiny_m2bert, wide_m2, lora, sparse]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(x: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """The slices of all ranks, joined."""
    pieces = [torch.empty_like(x) for _ in range(mesh.size())]
    dist.all_gather(pieces, x.contiguous(), group=mesh.get_group())
    return torch.cat(pieces, dim)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and labels, more of which are left out of the first half than of the second."""
    ids = dna_ids(length=LENGTH, seed=seed)
    labels = ids.masked_fill((torch.arange(LENGTH) % 3 == 0) & (torch.arange(LENGTH) < 31), -100)
    return ids, labels


def expected_pass(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process, averaged over the batches."""
    loss = torch.stack([model(ids, labels=labels).loss for ids, labels in batches]).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_pass(wrapped: nn.Module, inner: nn.Module, make: Maker, mesh: DeviceMesh, average: bool = False) -> None:
    """One training pass of sharded sequences, another one for each rank of the data dimension."""
    data, sequence = mesh["data"], mesh["sequence"]
    batches = [batch(seed) for seed in range(data.size())]
    expected, gradients = expected_pass(make().train(), batches)
    ids, labels = (split_sequence(x, sequence) for x in batches[data.get_local_rank()])
    loss = wrapped(ids, labels=labels).loss
    loss.backward()
    same = loss.detach().clone()
    dist.all_reduce(same, group=data.get_group())
    assert relative(same / data.size(), expected) <= TOLERANCE
    if average:
        average_gradients(inner, sequence)
    found = {name: full(p.grad) for name, p in inner.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative(found[name], gradient) <= TOLERANCE, name


def operation(mesh: DeviceMesh) -> None:
    batches, channels = 2, 8
    u, pre, post = (torch.randn(batches, channels, LENGTH, requires_grad=True) for _ in range(3))
    k, k_rev = (torch.randn(channels, LENGTH, requires_grad=True) for _ in range(2))
    skip = torch.randn(channels, requires_grad=True)
    weights = torch.randn(batches, channels, LENGTH)
    gated = {"skip": skip, "pre_gate": pre, "post_gate": post}
    for options in ({}, gated, {"k_rev": k_rev, "skip": skip}, {"causal": False}):
        tensors = [u, k, *(x for x in options.values() if isinstance(x, Tensor))]
        y = fft_conv(u, k, **options)
        gradients = torch.autograd.grad((y * weights).sum(), tensors)
        slices = {name: split_sequence(x, mesh, 2) if name.endswith("gate") else x for name, x in options.items()}
        part = sharded_fft_conv(split_sequence(u, mesh, 2), k, mesh, **slices)
        assert part.is_contiguous()
        assert relative(part, split_sequence(y, mesh, 2)) <= TOLERANCE
        found = torch.autograd.grad((part * split_sequence(weights, mesh, 2)).sum(), tensors)
        for actual, gradient in zip(found, gradients, strict=True):
            total = actual.clone()
            dist.all_reduce(total, group=mesh.get_group())
            assert relative(total, gradient) <= TOLERANCE
    with torch.autocast("cpu", torch.bfloat16):
        part = sharded_fft_conv(split_sequence(u, mesh, 2), k, mesh)
    assert part.dtype == torch.bfloat16
    assert relative(part, split_sequence(fft_conv(u, k), mesh, 2)) <= 5e-3


def inference(make: Maker, mesh: DeviceMesh, filter_length: int | None = None) -> None:
    # In float64, since the sines of some filters amplify the rounding of a projection of few positions.
    model, ids = patch_model(make().double(), filter_length=filter_length), batch()[0]
    with torch.no_grad():
        logits = model(ids).logits
        assert shard_sequence(model, mesh) is model
        for _ in range(2):
            assert relative(gather(model(split_sequence(ids, mesh)).logits, mesh), logits) <= 1e-10
        enable_long_sequences(model, positions=7, channels=3)
        assert relative(gather(model(split_sequence(ids, mesh)).logits, mesh), logits) <= 1e-10
        twin = copy.deepcopy(model)
        assert relative(gather(twin(split_sequence(ids, mesh)).logits, mesh), logits) <= 1e-10


def plain_training(make: Maker, mesh: DeviceMesh) -> None:
    """Without DDP or FSDP; for the data dimension of size one."""
    model = shard_sequence(make().train(), mesh["sequence"])
    check_pass(model, model, make, mesh, average=True)


def data_parallel(make: Maker, mesh: DeviceMesh) -> None:
    for wrap_first in (True, False):
        model = make().train()
        wrapped = DistributedDataParallel(model) if wrap_first else None
        shard_sequence(wrapped or model, mesh["sequence"])
        check_pass(wrapped or DistributedDataParallel(model), model, make, mesh)


def fully_sharded(make: Maker, mesh: DeviceMesh) -> None:
    for sliced, parameters_over in ((False, mesh["data", "sequence"]), (True, mesh._flatten("all"))):
        model = shard_sequence(make().train(), mesh["sequence"])
        if sliced:
            enable_long_sequences(model, positions=7, channels=3)
            model.gradient_checkpointing_enable()
        blocks = model.hyena.backbone.layers if hasattr(model, "hyena") else model.bert.encoder.layer
        for block in blocks:
            fully_shard(block, mesh=parameters_over)
        fully_shard(model, mesh=parameters_over)
        check_pass(model, model, make, mesh)


def own_loss(mesh: DeviceMesh) -> None:
    """Remote code that computes its loss by itself, and the share that the Trainer asks for."""
    ids, labels = batch()
    expected = expected_pass(tiny_hyenadna(), [(ids, labels)])[0]
    model = shard_sequence(tiny_hyenadna(), mesh)
    ids, labels = split_sequence(ids, mesh), split_sequence(labels, mesh)
    assert relative(causal_lm_loss(model(ids).logits, labels, mesh), expected) <= TOLERANCE
    count = torch.tensor(17)
    share = model(ids, labels=labels, num_items_in_batch=count).loss.detach()
    dist.all_reduce(share, group=mesh.get_group())
    assert relative(share * count, expected * (batch()[1][:, 1:] != -100).sum()) <= TOLERANCE
    assert relative(model(ids, labels=labels, return_dict=False)[0], expected) <= TOLERANCE
    remote = shard_sequence(remote_hyenadna(), mesh)
    with pytest.raises(ValueError, match=r"computes its loss by itself.*causal_lm_loss"):
        remote(ids, labels=labels)


def disagreements(mesh: DeviceMesh) -> None:
    """Each is an error on every rank, and the ranks can go on afterwards."""
    rank, last = mesh.get_local_rank(), mesh.size() - 1
    model = shard_sequence(tiny_hyenadna(), mesh)
    ids = split_sequence(batch()[0], mesh)
    shorter = ids[:, :-1] if rank == last else ids
    for arguments, problem in (
        ({"input_ids": shorter}, r"disagree on input_ids: int64 \(2, \d+\) on rank 0.*\(2, \d+\) on rank"),
        (
            {"input_ids": ids.int() if rank == 0 else ids},
            r"disagree on input_ids: int32 .* on rank 0, int64 .* on rank",
        ),
        ({"input_ids": ids, "labels": ids if rank else None}, "disagree on labels: nothing on rank 0, int64"),
        ({"input_ids": None if rank else ids}, "disagree on input_ids"),
        ({"input_ids": ids, "logits_to_keep": rank}, "disagree on logits_to_keep"),
        ({"input_ids": ids, "logits_to_keep": 1}, "logits_to_keep are not supported"),
        ({"input_ids": ids, "use_cache": rank == 0}, "disagree on logits_to_keep or a cache"),
        ({"input_ids": ids, "use_cache": True}, "caches and logits_to_keep are not supported"),
        ({"input_ids": ids[:, :0]}, "no tokens"),
        ({"input_ids": ids[:, :1]}, "a rank holds 1 positions, fewer than the 2"),
        ({"input_ids": ids.repeat(1, 5)}, "exceeds l_max=130"),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=problem):
            model(**arguments)
    with pytest.raises(ValueError, match="disagree on gradients"), torch.set_grad_enabled(rank == 0):
        model(ids)
    with pytest.raises(NotImplementedError, match="generate"):
        model.generate(ids, max_new_tokens=2)
    u, k = torch.randn(2, 8, 5), torch.randn(8, 5)
    with pytest.raises(ValueError, match="disagree on u: float32"):
        sharded_fft_conv(u[..., : 5 - (rank == last)], k, mesh)
    with pytest.raises(ValueError, match="disagree on skip: nothing on rank 0"):
        sharded_fft_conv(u, k, mesh, skip=torch.ones(8) if rank else None)
    with pytest.raises(ValueError, match=f"7 channels cannot be divided among {mesh.size()} ranks"):
        sharded_fft_conv(u[:, :7], k[:7], mesh)
    with pytest.raises(ValueError, match="k must have shape"):
        sharded_fft_conv(u, k[:4], mesh)
    with pytest.raises(ValueError, match="cannot be divided among"):
        split_sequence(batch()[0][:, :59], mesh)
    assert model(ids).logits.shape[:2] == ids.shape


def refusals(mesh: DeviceMesh) -> None:
    for make, problem in (
        (tiny_hyenadna_classifier, "pools its sequence"),
        (lambda: tiny_hyenadna(d_model=15), "15 channels cannot be divided among 2 ranks"),
        (lambda: nn.Linear(2, 2), "found no long convolution"),
    ):
        with pytest.raises(ValueError, match=problem):
            shard_sequence(make(), mesh["sequence"])
    with pytest.raises(ValueError, match="one dimension of a mesh, this one has 2"):
        shard_sequence(tiny_hyenadna(), mesh)
    with pytest.raises(TypeError, match="a DeviceMesh or a ProcessGroup, not a int"):
        shard_sequence(tiny_hyenadna(), 2)
    model = shard_sequence(tiny_hyenadna(), mesh["sequence"])
    with pytest.raises(ValueError, match="sharded already"):
        shard_sequence(model, mesh["sequence"])
    with pytest.raises(PatchError, match="call unshard_sequence"):
        unpatch_model(model)
    fully_shard(mixer_model := patch_model(tiny_hyenadna()).hyena.backbone.layers[0].mixer)
    with pytest.raises(PatchError, match="before fully_shard"):
        shard_sequence(mixer_model, mesh["sequence"])


def undone(mesh: DeviceMesh) -> None:
    model = tiny_hyenadna()
    before = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    ids = batch()[0]
    logits = model(ids).logits
    shard_sequence(model, mesh)
    assert patch_report(model).replaced == 2
    assert type(model).__name__ == "HyenaDNAForCausalLM"
    enable_long_sequences(model, positions=7)
    assert unshard_sequence(model) is model
    assert relative(model(ids).logits, logits) <= TOLERANCE
    unpatch_model(disable_long_sequences(unshard_sequence(model)))
    assert {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()} == before


def run(rank: int, port: int) -> None:
    # A deadlock is a failure, and soon.
    with process_group(rank, RANKS, port, timeout=timedelta(seconds=60)):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
        four = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "sequence"))
        torch.manual_seed(0)
        for number, (check, arguments) in enumerate(checks(mesh, four)):
            try:
                check(*arguments)
            except Exception as error:
                raise AssertionError(f"check {number}, {check.__name__}{arguments}") from error


def checks(mesh: DeviceMesh, four: DeviceMesh) -> list[tuple[Callable[..., None], tuple[Any, ...]]]:
    two = mesh["sequence"]
    return [
        (operation, (two,)),
        (operation, (four["sequence"],)),
        *((inference, (make, two)) for make in (*NATIVE, remote_hyenadna)),
        (inference, (tiny_m2bert, four["sequence"])),
        (inference, (lambda: build(BertForMaskedLM, BertConfig()), two)),
        # Fewer taps than a slice has positions, and more; of filters that cut themselves, and of others.
        *((inference, (make, two, taps)) for make in (tiny_hyenadna, remote_hyenadna) for taps in (11, 40)),
        *((plain_training, (make, four)) for make in (*NATIVE, cut)),
        (data_parallel, (tiny_hyenadna, mesh)),
        (data_parallel, (tiny_m2bert, mesh)),
        (fully_sharded, (tiny_hyenadna, mesh)),
        (own_loss, (four["sequence"],)),
        (disagreements, (two,)),
        (disagreements, (four["sequence"],)),
        (refusals, (mesh,)),
        (undone, (two,)),
    ]


def test_four_processes() -> None:
    # All four fork from one process that has imported what takes long.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "transformers", "peft"])
    torch.multiprocessing.start_processes(run, (free_port(),), nprocs=RANKS, start_method="forkserver")
