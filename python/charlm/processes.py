"""Several processes that train one model, as torchrun starts them: each takes some rows of every
batch, and the gradients are averaged by torch's DistributedDataParallel, or by FSDP2, where each
also keeps a share of the weights and the optimiser's state only.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from charlm.errors import CharlmError

# Nothing that one process does alone between two meetings takes as long.
_PATIENCE = timedelta(seconds=50)
# Steps between two questions that all answer together, each some 0.1 ms.
_ASK_EVERY = 8


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """The one that writes and shows."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """Its own of a batch's rows: they don't overlap, and every row is somebody's."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def seed(self, seed: int) -> int:
        """Its own of a run's, for the dropout of its rows; the first has the run's."""
        return seed + self.rank * 1_000_003

    def total(self, *numbers: float) -> list[float]:
        """Of each number the sum over all processes; all call it at the same place."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(sums)
        return sums.tolist()

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor of this shape, by rank, on the CPU; all call it together."""
        tensor = tensor.detach().cpu().contiguous()
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(found, tensor)
        return found

    def joined_rows(self, tensor: Tensor, count: int) -> Tensor:
        """(layers, rows of each process, H) -> (layers, count, H), on the CPU; all call it."""
        most = -(-count // self.size)
        padded = tensor.new_zeros(tensor.shape[0], most, tensor.shape[2])
        padded[:, : tensor.shape[1]] = tensor
        parts = self.gathered(padded)
        shares = [Processes(rank, self.size).rows(count) for rank in range(self.size)]
        return torch.cat(
            [part[:, : s.stop - s.start] for part, s in zip(parts, shares, strict=True)], dim=1
        )

    def any(self, answer: bool, step: int) -> bool:
        """Whether one process says so. All call it at the same step; several processes hear of
        each other every few steps only."""
        if self.size == 1:
            return answer
        return step % _ASK_EVERY == 0 and self.total(answer)[0] > 0

    def together(self, model: nn.Module, device: torch.device, shares: bool) -> nn.Module:
        """The model, whose gradients are averaged over all processes by every backward.

        Args:
            shares: each process keeps a share of its weights only, which are DTensors then.
        """
        if self.size == 1:
            return model
        if not shares:
            return DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh  # takes a second to import
        from torch.distributed.fsdp import fully_shard

        # The scores are a view, which nothing here writes to.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        fully_shard(model, mesh=init_device_mesh(device.type, (self.size,)))
        return model

    def part(self) -> None:
        """Once all have done what they do together: nobody waits for what one does alone then."""
        if self.size > 1:
            distributed.barrier()
            distributed.destroy_process_group()

    @contextlib.contextmanager
    def apart(self, together: nn.Module, really: bool) -> Iterator[None]:
        """Within it, backward only adds to this process's gradients."""
        if really and isinstance(together, DistributedDataParallel):
            with together.no_sync():
                yield
        else:
            yield


ALONE = Processes()


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this may be a share, a DTensor; all processes call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def share_as(tensor: Tensor, other: Any) -> Tensor:
    """This process's share, where the other tensor is one."""
    if not hasattr(other, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Those that torchrun has started; else this one alone.

    Args:
        device: what they train on.

    Raises:
        CharlmError: another process has ended, or doesn't answer.
    """
    by_torchrun = distributed.is_available() and distributed.is_torchelastic_launched()
    size = int(os.environ["WORLD_SIZE"]) if by_torchrun else 1
    if size == 1:
        yield ALONE
        return
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    try:
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        distributed.init_process_group(backend, timeout=_PATIENCE)
        yield Processes(distributed.get_rank(), size)
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise CharlmError(
            f"process {os.environ.get('RANK')} of {size} lost another one of this run ({reason}): "
            "charlm train --resume goes on from the last checkpoint"
        ) from None
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
