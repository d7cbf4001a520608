"""Sequences sharded over a single process, this one: everything but the exchange, which has no partner."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from model_factory import dna_ids, tiny_hyenadna, tiny_m2bert
from patching import assert_equal_models, relative
from torch import nn

from hf_flashfftconv import fft_conv, shard_sequence
from hf_flashfftconv.patch import patch_model
from hf_flashfftconv.sequences import (
    average_gradients,
    causal_lm_loss,
    sharded_fft_conv,
    split_sequence,
    unshard_sequence,
)


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [tiny_hyenadna, tiny_m2bert])
def test_model(make: Callable[[], nn.Module], group: dist.ProcessGroup) -> None:
    original = make()
    model = shard_sequence(copy.deepcopy(original), group)
    ids = split_sequence(dna_ids(), group)
    assert_equal_models(model, original, lambda model: model(ids).logits)
    assert_equal_models(model, original, lambda model: model(ids, labels=ids).loss)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    average_gradients(model, group)
    assert all(map(torch.equal, before, [p.grad for p in model.parameters() if p.grad is not None]))
    loss = model(ids, labels=ids, return_dict=False)[0]
    assert relative(loss, original(ids, labels=ids).loss) <= 1e-5
    assert_equal_models(unshard_sequence(model), patch_model(original), lambda model: model(ids).logits)


def test_operation_and_loss(group: dist.ProcessGroup) -> None:
    u, gate, k, skip = torch.randn(2, 4, 9), torch.randn(2, 4, 9), torch.randn(4, 9), torch.randn(4)
    options = {"skip": skip, "pre_gate": gate, "post_gate": gate, "k_rev": k}
    assert relative(sharded_fft_conv(u, k, group, **options), fft_conv(u, k, **options)) <= 1e-6
    with pytest.raises(TypeError, match="k must be a torch"):
        sharded_fft_conv(u, None, group)
    logits, labels = torch.randn(2, 9, 5), torch.randint(0, 5, (2, 9))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert relative(causal_lm_loss(logits, labels, group), expected) <= 1e-6


def test_calls_that_fit_no_signature_are_the_forwards_errors(group: dist.ProcessGroup) -> None:
    model = shard_sequence(tiny_hyenadna(), group)
    with pytest.raises(TypeError, match="takes from 1 to"):
        model(*[None] * 20)
    with pytest.raises(ValueError, match="exactly one of"):
        model()
