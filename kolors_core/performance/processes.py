"""Process groups: join the processes that `torchrun` started."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from kolors_core.devices import named_device
from weights_convert.untrusted_files import one_line

CONNECT_TIMEOUT = timedelta(seconds=60)


def join_processes(name: str | None = None) -> torch.device:
    """Join the processes of `torchrun`, if it started this one, and return this process's device.

    name: None selects the best device. Unless a GPU is named by number, each process of a machine gets its
    own. Backends: NCCL for CUDA tensors, gloo for CPU tensors. OSError if `torchrun` cannot be reached.
    """
    device = named_device(name)
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        (_init_with_torchrun_store if is_agents else dist.init_process_group)(backend)
    if device.type == "cuda":
        if name in (None, "cuda"):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def _init_with_torchrun_store(backend: str) -> None:
    """Initialize the process group; OSError after a minute where torch itself would wait for half an hour."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        # torch's store retries until its timeout; a socket finds at once that nobody listens.
        socket.create_connection(address, CONNECT_TIMEOUT.total_seconds()).close()
        store, rank, world = next(rendezvous("env://", timeout=CONNECT_TIMEOUT))
    except (OSError, RuntimeError) as error:
        raise OSError(f"torchrun, which started this process, cannot be reached: {one_line(error)}") from None
    store.set_timeout(default_pg_timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
