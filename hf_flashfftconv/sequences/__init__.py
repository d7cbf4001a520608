"""Sequences of millions of positions: worked on in slices on one GPU, or sharded over several."""

from .convolution import sharded_fft_conv
from .long import disable_long_sequences, enable_long_sequences
from .loss import average_gradients, causal_lm_loss
from .sharding import shard_sequence, split_sequence, unshard_sequence

__all__ = [
    "average_gradients",
    "causal_lm_loss",
    "disable_long_sequences",
    "enable_long_sequences",
    "shard_sequence",
    "sharded_fft_conv",
    "split_sequence",
    "unshard_sequence",
]
