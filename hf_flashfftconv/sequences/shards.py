"""The ranks that hold the slices of one sequence, and their agreement on what they are about to do."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)
_MAX_DIMS = 4
_FIELDS = _MAX_DIMS + 3


class SequenceShards:
    """The ranks of one sequence: rank r of P holds the positions r L / P to (r + 1) L / P.

    Args:
        mesh (`DeviceMesh` or `ProcessGroup`): A mesh of one dimension, such as `mesh["sequence"]`, or a group.

    Raises:
        TypeError: `mesh` is neither.
        ValueError: The mesh has more than one dimension, or this process is not part of it.
    """

    def __init__(self, mesh: Any) -> None:
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                raise ValueError(
                    f"a sequence is sharded over one dimension of a mesh, this one has {mesh.ndim}: "
                    f'{mesh.mesh_dim_names}; pass one of them, such as mesh["sequence"]'
                )
            mesh = mesh.get_group()
        if not isinstance(mesh, dist.ProcessGroup):
            raise TypeError(f"a sequence is sharded over a DeviceMesh or a ProcessGroup, not a {type(mesh).__name__}")
        self.group = mesh
        self.rank = dist.get_rank(mesh)
        self.size = dist.get_world_size(mesh)
        if self.rank < 0:
            raise ValueError("this process is not part of the group that the sequence is sharded over")
        # Where the group has a CPU backend beside NCCL, agreeing does not wait for the GPU.
        backends = dist.get_backend_config(mesh)
        self._device = "cpu" if "cpu:" in backends or "gloo" in backends else "cuda"

    def __deepcopy__(self, memo: Any) -> "SequenceShards":
        # A group of processes is no data: copies of a model are sharded over the same one.
        return self

    def agree(self, tensors: dict[str, Tensor | None], **numbers: int) -> None:
        """Raises the same error on every rank unless all ranks pass the same shapes, dtypes and numbers.

        It must be the first thing that the ranks do: one that raises an error of its own before leaves the others
        waiting. Costs one gathering of some hundred bytes.

        Args:
            tensors (`dict[str, torch.Tensor | None]`): By name; the names are the same on every rank.
            numbers (`int`): What else has to be the same.

        Raises:
            ValueError: The ranks disagree; the message has what each of them passed.
        """
        row = [field for x in tensors.values() for field in _describe(x)] + list(numbers.values())
        mine = torch.tensor(row, dtype=torch.int64, device=self._device)
        everyone = list(mine.new_empty(self.size, len(row)))
        dist.all_gather(everyone, mine, group=self.group)
        rows = [other.tolist() for other in everyone]
        for i, name in enumerate(tensors):
            _compare(name, [_read(other[i * _FIELDS : (i + 1) * _FIELDS]) for other in rows])
        for i, name in enumerate(numbers, len(tensors) * _FIELDS):
            _compare(name, [str(other[i]) for other in rows])

    def check_channels(self, channels: int) -> None:
        """Raises `ValueError` unless every rank can get as many channels."""
        if channels % self.size:
            raise ValueError(f"{channels} channels cannot be divided among {self.size} ranks")


def _describe(x: Tensor | None) -> list[int]:
    if not isinstance(x, Tensor):
        return [-1] * _FIELDS
    dtype = _DTYPES.index(x.dtype) if x.dtype in _DTYPES else len(_DTYPES)
    shape = [*x.shape[:_MAX_DIMS], *[0] * (_MAX_DIMS - x.dim())]
    return [x.dim(), *shape, dtype, int(x.requires_grad)]


def _read(fields: list[int]) -> str:
    dims, *shape, dtype, requires_grad = fields
    if dims < 0:
        return "nothing"
    kind = str(_DTYPES[dtype]).removeprefix("torch.") if dtype < len(_DTYPES) else "another dtype"
    return f"{kind} {tuple(shape[:dims])}" + (" with gradient" if requires_grad else "")


def _compare(name: str, values: list[str]) -> None:
    if len(set(values)) > 1:
        listed = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
        raise ValueError(
            f"the ranks of a sequence disagree on {name}: {listed}. Each rank holds an equal slice of the same "
            "sequences; pad them to a multiple of the number of ranks."
        )
