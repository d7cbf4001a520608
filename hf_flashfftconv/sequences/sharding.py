"""`shard_sequence`: a model whose ranks hold one slice of a sequence each."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from .exchange import sum_over_ranks
from .loss import IGNORED, next_tokens, number_of_targets
from .shards import SequenceShards
from .slicing import inner_model, patched_mixers, set_slicing, sliced_mixers

_NO_GENERATION = "a sharded sequence ends on its last rank alone: generate, caches and logits_to_keep are not supported"


def shard_sequence(model: nn.Module, mesh: Any) -> nn.Module:
    """Makes a model work on sequences that are sharded over P ranks, in place.

    From then on rank r passes positions r L / P to (r + 1) L / P of the token ids, and of the labels, and gets the
    logits of these positions; the positions that the filters see are those of the whole sequence. In each mixer the
    rank's slice is exchanged for all positions of H / P channels by all-to-all, convolved and exchanged back; a short
    convolution sees the last positions of the rank before; each rank generates the filters' taps of its own positions.
    Everything else in these models is local. The logits and gradients are those of one process to 1e-5 in float32.

    `loss` is the mean over the labels of all ranks, the same on every rank; labels are token ids, as for one process,
    and a slice's last position predicts the first label of the next slice. Where `num_items_in_batch` is passed, as
    [`~transformers.Trainer`] does, `loss` is the rank's share.

    Gradients are to be averaged over the ranks of the sequence, as DDP or `fully_shard` does over a mesh that holds
    them (flattened with the dimension of data parallelism, if there is one), or else [`average_gradients`]. Shard the
    sequence before `fully_shard`. [`patch_model`] is called first if it has not been.

    Before each forward pass the ranks compare what they have been passed, a few hundred bytes, so that a difference is
    an error on all of them and never a deadlock. Filters are not kept between calls.

    Args:
        model (`nn.Module`): A model that [`patch_model`] supports, on every rank with the same weights.
        mesh (`DeviceMesh` or `ProcessGroup`): The ranks of one sequence in the order of its slices, such as
            `init_device_mesh("cuda", (2,), mesh_dim_names=("sequence",))`.

    Returns:
        `nn.Module`: `model` itself.

    Raises:
        TypeError: `model` is not a module, or `mesh` is not of these types.
        ValueError: A number of channels is not a multiple of P, the model pools its sequence (classifiers), or it is
            sharded already. `PatchError`, which is one, if a long convolution cannot work on slices.
    """
    shards = SequenceShards(mesh)
    inner = inner_model(model)
    if isinstance(inner, ShardedModel):
        raise ValueError("the sequence of this model is sharded already; call unshard_sequence first")
    if getattr(inner, "loss_type", None) == "ForSequenceClassification" or _pools(inner):
        raise ValueError(f"{type(inner).__name__} pools its sequence, of which each rank has a slice only")
    mixers = patched_mixers(inner)
    for mixer in mixers.values():
        shards.check_channels(mixer.d_model)
    set_slicing(mixers, shards=shards)
    original: Any = type(inner)
    inner.__class__ = _sharded_class(original)
    inner._flashfftconv_shards = shards
    return model


def unshard_sequence(model: nn.Module) -> nn.Module:
    """Undoes [`shard_sequence`]; the model stays patched.

    Args:
        model (`nn.Module`): The model, wrapped or not; one that is not sharded is left as it is.

    Returns:
        `nn.Module`: `model` itself.

    Raises:
        PatchError: Another library has since built its own classes on top of the mixers' (`fully_shard` does).
    """
    inner = inner_model(model)
    if isinstance(inner, ShardedModel):
        if type(inner)._flashfftconv_original not in type(inner).__bases__:
            raise PatchError(f"{type(inner).__name__} was built on top of the sharded class; undo that first")
        set_slicing(sliced_mixers(inner), shards=None)
        inner.__class__ = type(inner)._flashfftconv_original
        del inner._flashfftconv_shards
    return model


def split_sequence(x: Tensor, mesh: Any, dim: int = 1) -> Tensor:
    """The rank's slice of a tensor that all ranks have as a whole, such as token ids or labels.

    Args:
        x (`torch.Tensor`): The whole, the same on every rank.
        mesh (`DeviceMesh` or `ProcessGroup`): The ranks, in the order of their slices.
        dim (`int`, *optional*, defaults to 1): The dimension of the positions.

    Raises:
        ValueError: The number of positions is not a multiple of the number of ranks.
    """
    shards = SequenceShards(mesh)
    if x.shape[dim] % shards.size:
        raise ValueError(
            f"{x.shape[dim]} positions cannot be divided among {shards.size} ranks; pad them to a multiple of that"
        )
    return x.chunk(shards.size, dim)[shards.rank].contiguous()


class ShardedModel(nn.Module):
    """What the class of a sharded model gets in front: the ranks' agreement, positions, and labels across slices."""

    _flashfftconv_shards: SequenceShards
    _flashfftconv_original: type[nn.Module]

    def _sharded_forward(self, *args: Any, **kwargs: Any) -> Any:
        shards, signature = self._flashfftconv_shards, inspect.signature(self._flashfftconv_original.forward)
        values = _bind(signature, self, args, kwargs)
        _agree(shards, signature, values, self.training)
        kwargs = {**kwargs, **self._whole_positions(signature, values)}
        labels = values.get("labels")
        if labels is None:
            return self._flashfftconv_original.forward(self, *args, **kwargs)
        kwargs.update(self._whole_labels(labels, values))
        output = self._flashfftconv_original.forward(self, *args, **kwargs)
        if "num_items_in_batch" in values:
            return output
        if isinstance(output, tuple):
            return sum_over_ranks(output[0], shards), *output[1:]
        output.loss = sum_over_ranks(output.loss, shards)
        return output

    def _whole_positions(self, signature: inspect.Signature, values: dict[str, Any]) -> dict[str, Tensor]:
        """Positions in the whole sequence, for models that embed positions."""
        tokens = values.get("input_ids") if values.get("input_ids") is not None else values.get("inputs_embeds")
        if "position_ids" not in signature.parameters or values.get("position_ids") is not None or tokens is None:
            return {}
        length, shards = tokens.shape[1], self._flashfftconv_shards
        start = shards.rank * length
        return {"position_ids": torch.arange(start, start + length, device=tokens.device)[None]}

    def _whole_labels(self, labels: Tensor, values: dict[str, Any]) -> dict[str, Tensor]:
        """What lets the loss functions of transformers see the next rank's first label and count all labels."""
        kind = getattr(self, "loss_type", None)
        code = inspect.unwrap(self._flashfftconv_original.forward).__code__
        if kind not in ("ForCausalLM", "ForMaskedLM") or "loss_function" not in code.co_names:
            raise ValueError(
                f"{type(self).__name__} computes its loss by itself, from the rank's slice alone; leave out labels and "
                "pass the logits to hf_flashfftconv.sequences.causal_lm_loss"
            )
        shards, ignored = self._flashfftconv_shards, values.get("ignore_index", IGNORED)
        targets = next_tokens(labels, shards, ignored) if kind == "ForCausalLM" else labels
        found = {"shift_labels": targets} if kind == "ForCausalLM" else {}
        if "num_items_in_batch" not in values:
            found["num_items_in_batch"] = number_of_targets(targets, shards, ignored)
        return found


def _bind(signature: inspect.Signature, model: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name; empty if they do not fit, which the forward itself will say."""
    try:
        values = dict(signature.bind_partial(model, *args, **kwargs).arguments)
    except TypeError:
        return {}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            values.update(values.pop(parameter.name, {}))
        elif parameter.kind is parameter.VAR_POSITIONAL:
            values[parameter.name] = next(iter(values.get(parameter.name, ())), None)
    return values


def _agree(shards: SequenceShards, signature: inspect.Signature, values: dict[str, Any], training: bool) -> None:
    # The first parameter is the model.
    names = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD][1:]
    tensors = {name: value if isinstance(value := values.get(name), Tensor) else None for name in names}
    kept = values.get("logits_to_keep", 0)
    # A model in training mode makes no cache.
    given = any(values.get(name) is not None for name in ("past_key_values", "cache"))
    cached = given or (bool(values.get("use_cache")) and not training)
    decoding = isinstance(kept, Tensor) or kept != 0 or cached
    flags = {"gradients": torch.is_grad_enabled(), "training": training, "logits_to_keep or a cache": decoding}
    shards.agree(tensors, **{name: int(value) for name, value in flags.items()})
    if decoding:
        raise NotImplementedError(_NO_GENERATION)


def _pools(model: nn.Module) -> bool:
    return any(getattr(part, "pooler", None) is not None for part in (model, getattr(model, "base_model", None)))


@functools.cache
def _sharded_class(original: Any) -> Any:
    """A subclass of the model's own class, of the same name, by which transformers saves it, and signature."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._sharded_forward(*args, **kwargs)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(_NO_GENERATION)

    body = {"__module__": original.__module__, "_flashfftconv_original": original, "forward": forward}
    if hasattr(original, "generate"):
        body["generate"] = generate
    return type(original.__name__, (ShardedModel, original), body)
