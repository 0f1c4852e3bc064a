"""A process group under ``mpirun``: MPI tells the ranks apart and carries one address; torch's own store and backends do the
rest.

mpi4py is imported here only, and only when a rank was started by MPI.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_NAMES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
}


def environment_of(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's rank variables from those of Open MPI, MPICH or Intel MPI; a variable nobody sets is left out."""
    found = {}
    for name, candidates in _NAMES.items():
        value = next((environment[c] for c in candidates if c in environment), None)
        if value is not None:
            found[name] = value
    return found


def bootstrap(timeout: timedelta) -> Store | None:
    """Set torch's variables for a process started by MPI and return the store all ranks share.

    Without mpi4py this still works if MASTER_ADDR and MASTER_PORT say where to meet; then None is returned and ``env://`` does
    the rest. Raises ImportError, with what to do, if there is neither.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
            os.environ.update(environment_of(os.environ))
            return None
        raise ImportError(
            f"This process was started by MPI, but mpi4py cannot be used ({error}). Install it "
            f"(pip install 'ringflash[mpi]'), or export MASTER_ADDR (host of rank 0) and MASTER_PORT (a free port there) to all "
            f"ranks, or start with torchrun."
        ) from error
    return store_of(MPI.COMM_WORLD, MPI.COMM_TYPE_SHARED, timeout)


def store_of(comm: Any, shared: int, timeout: timedelta) -> Store:
    """A TCPStore over an MPI communicator, and torch's variables set from it.

    Rank 0 opens the store on a port the system picks and broadcasts the port that it got: no guess, so no race.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    local = comm.Split_type(shared, key=rank)
    local_rank, local_size = local.Get_rank(), local.Get_size()
    local.Free()
    address, store = None, None
    if rank == 0:
        host = os.environ.get("MASTER_ADDR") or (
            "127.0.0.1" if local_size == size else socket.gethostbyname(socket.gethostname())
        )
        store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
        address = (host, store.port)
    host, port = comm.bcast(address, root=0)
    if store is None:
        store = dist.TCPStore(host, port, size, is_master=False, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(local_size),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    return store
