"""Losses over sequences whose slices lie on several ranks, and the gradients that come from them."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .exchange import from_next, sum_over_ranks
from .shards import SequenceShards

IGNORED = -100


def next_tokens(labels: Tensor, shards: SequenceShards, ignored: int = IGNORED) -> Tensor:
    """For each position of the slice `(B, L / P)` the label of the next one, which may be on the next rank."""
    return torch.cat([labels[:, 1:], from_next(labels[:, :1], shards, ignored)], dim=1)


def number_of_targets(targets: Tensor, shards: SequenceShards, ignored: int = IGNORED) -> Tensor:
    """How many positions of all ranks have something to predict."""
    count = (targets != ignored).sum()
    dist.all_reduce(count, group=shards.group)
    return count


def causal_lm_loss(logits: Tensor, labels: Tensor, mesh: Any, ignore_index: int = IGNORED) -> Tensor:
    """Mean next-token cross-entropy of sequences that are sharded over P ranks, for models that bring their own loss.

    The last position of a slice predicts the first label of the next one. All ranks get the same value. Its gradients
    are those of the sum of the P equal values: the average over the ranks, which DDP and FSDP take, is the gradient of
    the loss.

    Args:
        logits (`torch.Tensor` of shape `(B, L / P, V)`): The rank's slice.
        labels (`torch.LongTensor` of shape `(B, L / P)`): The rank's slice of the token ids, not shifted.
        mesh (`DeviceMesh` or `ProcessGroup`): The ranks, in the order of their slices.
        ignore_index (`int`, *optional*, defaults to -100): Label of positions that are not to be predicted.

    Raises:
        ValueError: The ranks disagree on shapes; on every rank.
    """
    shards = SequenceShards(mesh)
    shards.agree({"logits": logits, "labels": labels})
    targets = next_tokens(labels, shards, ignore_index)
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=ignore_index, reduction="sum")
    return sum_over_ranks(total / number_of_targets(targets, shards, ignore_index), shards)


@torch.no_grad()
def average_gradients(model: nn.Module, mesh: Any) -> None:
    """Averages the gradients of a model over the ranks of its sequence, where neither DDP nor FSDP does.

    Args:
        model (`nn.Module`): A model after the backward pass, the same parameters having gradients on every rank.
        mesh (`DeviceMesh` or `ProcessGroup`): The ranks.

    Raises:
        ValueError: The parameters are sharded: FSDP has averaged their gradients.
    """
    shards = SequenceShards(mesh)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        raise ValueError("the parameters are sharded: FSDP has averaged their gradients in the backward pass")
    for gradient in gradients:
        dist.all_reduce(gradient, group=shards.group)
        gradient /= shards.size
