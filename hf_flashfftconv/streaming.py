"""Long convolutions of sequences that arrive piece by piece, as in text generation."""

import torch
from torch import Tensor

from .functional import fft_conv
from .ops.reference import good_fft_length

# Inputs of the newest block are summed directly: below this, a Fourier transform costs more to call than it saves.
BLOCK_SIZE = 128


class StreamingConv:
    """Causal convolution of a sequence that arrives in pieces, equal to [`fft_conv`] of the whole sequence.

    A new position costs O(log^2 L) operations a channel on average, where L is the length so far, instead of the
    O(L log L) of a convolution of everything. This is relaxed multiplication (van der Hoeven, 2002), as in Flash
    Inference (arXiv:2410.12982) and FutureFill (arXiv:2410.03766): once U inputs are complete, one Fourier transform of
    2U points adds what they contribute to the next U outputs. Sizes U = `block_size` * 2^j alternate such that each
    input reaches each later output exactly once. Inside the newest block the sum is taken directly. A long first piece
    costs one `fft_conv`, and a second one of its size when the stream goes on.

    With B sequences, H channels and room for K positions, the state takes B H K elements of the inputs' dtype and at
    most B H K float32 for what is known of future outputs, beside 4 H K bytes of taps and about 8 H K of spectra. It is
    an ordinary object with tensors: `copy.deepcopy` branches a stream. No gradients flow through it.

    Args:
        k (`torch.Tensor` of shape `(H, K)`):
            The filters, lag 0 first, floating point. K is the number of positions that there is room for.
        skip (`torch.Tensor` of shape `(H,)`, *optional*):
            Weight of the input itself, added to the convolution.
        block_size (`int`, *optional*, defaults to 128):
            The number of inputs that are summed directly; a matter of speed only.

    Raises:
        ValueError: a shape is wrong or `block_size` is below 1.

    Example:

    ```python
    >>> k, u = torch.randn(16, 1000), torch.randn(2, 16, 600)
    >>> stream = StreamingConv(k)
    >>> y = torch.cat([stream.append(u[..., :500]), *(stream.append(u[..., t : t + 1]) for t in range(500, 600))], -1)
    >>> torch.allclose(y, fft_conv(u, k), atol=1e-3)
    True
    ```
    """

    def __init__(self, k: Tensor, skip: Tensor | None = None, *, block_size: int = BLOCK_SIZE) -> None:
        if k.dim() != 2 or k.shape[1] == 0:
            raise ValueError(f"k must have shape (channels, taps >= 1), got {tuple(k.shape)}")
        if skip is not None and skip.shape != k.shape[:1]:
            raise ValueError(f"skip must have shape {tuple(k.shape[:1])} to fit k, got {tuple(skip.shape)}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self.length = 0
        self._k = k.detach()
        self._skip = None if skip is None else skip.detach()
        self._spectra: dict[int, Tensor] = {}
        self._inputs = self._k.new_empty(0, k.shape[0], 0)
        # Contributions of the inputs before `_settled` to the outputs from `_origin` on.
        self._pending = self._inputs
        self._origin = self._settled = 0

    @property
    def max_length(self) -> int:
        """The number of positions that there is room for."""
        return self._k.shape[1]

    @torch.compiler.disable
    def append(self, u: Tensor) -> Tensor:
        """Goes on with the next inputs.

        Args:
            u (`torch.Tensor` of shape `(B, H, n)`): The inputs, n at least 1; B, dtype and device never change.

        Returns:
            `torch.Tensor` of shape `(B, H, n)` and of the dtype of `u`: The outputs at the same positions.

        Raises:
            ValueError: `u` does not fit the stream, or there is no room; the stream stays as it was.
        """
        self._check(u)
        # The state outlives the call: it may hold neither a graph nor tensors that only inference mode can change.
        with torch.inference_mode(False), torch.no_grad():
            start, stop = self.length, self.length + u.shape[2]
            if start == 0:
                self._inputs = u.new_empty(*u.shape[:2], self.max_length)
            self._inputs[..., start:stop] = u
            if start == 0:
                self.length = stop
                return fft_conv(u, self._k, skip=self._skip)
            if u.shape[2] > max(self.block_size, start // 16):
                y = self._sum(0, stop, start, stop)
                self.length = stop
                self._look_away()
            else:
                y = self._advance(stop)
            if self._skip is not None:
                y = y + self._skip[:, None] * u
            return y.to(u.dtype)

    def truncate(self, length: int) -> None:
        """Forgets all positions from `length` on; free of cost inside the newest block.

        Raises:
            ValueError: the stream is not that long.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a stream of length {self.length} to {length}")
        if length < self._settled:
            self._look_away()
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Replaces the sequences of the batch by those with the indices `rows`, which may repeat."""
        if self.length == 0:
            return
        with torch.inference_mode(False), torch.no_grad():
            rows = rows.to(self._inputs.device)
            self._inputs = self._resized(self._inputs[..., : self.length].index_select(0, rows))
            if self._pending.numel() > 0:
                self._pending = self._pending.index_select(0, rows)

    def extend(self, k: Tensor) -> None:
        """Makes room for more positions.

        Args:
            k (`torch.Tensor` of shape `(H, K)`): More taps, which begin with those that the stream has.

        Raises:
            ValueError: `k` has other channels or fewer taps.
        """
        if k.dim() != 2 or k.shape[0] != self._k.shape[0] or k.shape[1] < self.max_length:
            wanted = f"({self._k.shape[0]}, at least {self.max_length})"
            raise ValueError(f"k must have shape {wanted}, got {tuple(k.shape)}")
        with torch.inference_mode(False), torch.no_grad():
            self._k = k.detach()
            self._spectra.clear()
            self._inputs = self._resized(self._inputs[..., : self.length])

    def _check(self, u: Tensor) -> None:
        if u.dim() != 3 or u.shape[1] != self._k.shape[0] or u.shape[2] == 0:
            raise ValueError(f"u must have shape (batch, {self._k.shape[0]}, positions >= 1), got {tuple(u.shape)}")
        if self.length + u.shape[2] > self.max_length:
            needed = self.length + u.shape[2]
            raise ValueError(f"the stream would have {needed} positions, more than its filters' {self.max_length} taps")
        held = self._inputs
        if self.length > 0 and (held.shape[0], held.dtype, held.device) != (u.shape[0], u.dtype, u.device):
            wanted, got = (f"batch {x.shape[0]}, {x.dtype} on {x.device}" for x in (held, u))
            raise ValueError(f"u must be like what the stream began with, {wanted}; got {got}")

    def _resized(self, inputs: Tensor) -> Tensor:
        resized = inputs.new_empty(*inputs.shape[:2], self.max_length)
        resized[..., : inputs.shape[2]] = inputs
        return resized

    def _look_away(self) -> None:
        """Drops what is known of future outputs."""
        self._pending = self._inputs.new_empty(0, self._k.shape[0], 0)
        self._origin = self._settled = 0

    def _advance(self, stop: int) -> Tensor:
        """Outputs of the positions up to `stop`, whose inputs are in place, block by block."""
        outputs = []
        while self.length < stop:
            self._settle()
            origin, pending = self._origin, self._pending
            last = min(stop, self._settled + self.block_size, origin + pending.shape[2])
            y = self._sum(self._settled, last, self.length, last)
            outputs.append(y + pending[..., self.length - origin : last - origin])
            self.length = last
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _settle(self) -> None:
        """Adds the newest block to the future outputs once it is full, and looks further ahead once that is needed."""
        now = self.length
        if now >= self._origin + self._pending.shape[2]:
            # All inputs at once, by a transform of a power of two that sees at least half of their length ahead.
            ahead = 1 << (now + max(self.block_size, now // 2) - 1).bit_length()
            # The old window is not needed while the new one is made.
            self._look_away()
            self._pending = self._sum(0, now, now, min(ahead, self.max_length))
            self._origin = self._settled = now
        elif now == self._settled + self.block_size:
            blocks = (now - self._origin) // self.block_size
            self._add_tile(now, self.block_size * (blocks & -blocks))
            self._settled = now

    def _add_tile(self, now: int, size: int) -> None:
        """Adds what the last `size` inputs contribute to the next `size` outputs."""
        x = self._inputs[..., now - size : now]
        if size not in self._spectra:
            self._spectra[size] = self._transform(self._k[:, : 2 * size], 2 * size)
        y = torch.fft.irfft(self._transform(x, 2 * size) * self._spectra[size], n=2 * size)[..., size:]
        future = self._pending[..., now - self._origin :][..., :size]
        future += y[..., : future.shape[2]]

    def _sum(self, start: int, stop: int, first: int, last: int) -> Tensor:
        """What the inputs of `start` to `stop` contribute to the outputs of `first` to `last`, in at least float32."""
        x = self._inputs[..., start:stop]
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:2], last - first, dtype=self._compute_dtype())
        if last - first == 1:
            taps = self._k[:, first - stop + 1 : first - start + 1].flip(-1)
            return (x.to(self._compute_dtype()) * taps).sum(-1, keepdim=True)
        # A circle on which sums wrap around to outputs before `first` only.
        end = last - start
        size = good_fft_length(max(end, stop - start + last - first - 1))
        spectrum = self._transform(x, size) * self._transform(self._k[:, :end], size)
        return torch.fft.irfft(spectrum, n=size)[..., first - start : end]

    def _transform(self, x: Tensor, size: int) -> Tensor:
        return torch.fft.rfft(x.to(self._compute_dtype()), n=size)

    def _compute_dtype(self) -> torch.dtype:
        dtype = torch.promote_types(self._k.dtype, torch.float32)
        return torch.promote_types(self._inputs.dtype, dtype)
