"""`enable_long_sequences`: sequences of millions of positions on one GPU."""

from torch import nn

from .slicing import inner_model, patched_mixers, set_slicing, sliced_mixers

POSITIONS = 1 << 16
CHANNELS = 32


def enable_long_sequences(model: nn.Module, positions: int = POSITIONS, channels: int = CHANNELS) -> nn.Module:
    """Bounds the memory that a model needs between its layers' inputs and outputs, in place.

    Projections, short convolutions, feed-forward layers, filter networks, language modelling head and loss run on
    slices of `positions` positions, the long convolutions on blocks of `channels` channels. The results are the same
    to 1e-5 in float32. In training each slice is computed again in the backward pass. With gradient checkpointing
    (`model.gradient_checkpointing_enable()`, or `gradient_checkpointing=True` of the Trainer) nothing but the input
    of each layer is kept.

    With B sequences of L positions, D channels and n layers, activations take the following bytes, where e is the size
    of a weight's dtype (or the autocast dtype's), and those with S instead of L, one slice's, do not grow with L:

    | | without | with |
    |---|---|---|
    | residual stream, kept for n layers in training with checkpointing | 4 B L D | 4 B L D |
    | norm, projection, short convolution, gates | 11 e B L D | 3 e B L D + 7 e B S D |
    | filter network of width w and two hidden layers, and taps | 24 L w + 12 L D | 24 S w + 4 L D, twice in training |
    | long convolution by `torch.fft`, `channels` C | 48 B L D | 48 B L C + e B L D |
    | feed-forward layer | 9 e B L D | 9 e B S D + e B L D |
    | logits of V tokens and loss | 12 B L V | 12 B S V |

    Where `labels` are passed, the output has the loss and no logits: these never exist as a whole. The feed-forward
    layers, head and loss of the native HyenaDNA and Hyena models run on slices; of other models [`patch_model`]
    supports, the mixers do. [`patch_model`] is called first if it has not been.

    Args:
        model (`nn.Module`): The model; one whose long sequences are enabled already gets the new sizes.
        positions (`int`, *optional*, defaults to 65,536): Positions in a slice.
        channels (`int`, *optional*, defaults to 32): Channels in a block.

    Returns:
        `nn.Module`: `model` itself.

    Raises:
        TypeError: `model` is not a module.
        ValueError: A size is not positive. `PatchError`, which is one, if a long convolution cannot work on slices.
    """
    for name, size in (("positions", positions), ("channels", channels)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    inner = inner_model(model)
    set_slicing(patched_mixers(inner), positions=positions, channels=channels)
    _set_slice_size(inner, positions)
    return model


def disable_long_sequences(model: nn.Module) -> nn.Module:
    """Undoes [`enable_long_sequences`]; the model stays patched.

    Args:
        model (`nn.Module`): The model; one whose long sequences are not enabled is left as it is.

    Returns:
        `nn.Module`: `model` itself.
    """
    inner = inner_model(model)
    set_slicing(sliced_mixers(inner), positions=None, channels=None)
    _set_slice_size(inner, None)
    return model


def _set_slice_size(model: nn.Module, positions: int | None) -> None:
    for module in model.modules():
        if hasattr(type(module), "slice_size"):
            # Off is the attribute of the class: nothing is left on the module.
            vars(module).pop("slice_size", None)
            if positions is not None:
                module.slice_size = positions
