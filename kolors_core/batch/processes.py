"""Processes of one run: joining those that `torchrun` has started."""

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.constants import default_pg_timeout

from kolors_core.devices import named_device
from weights_convert.untrusted_files import one_line


def join_processes(name: str | None = None) -> torch.device:
    """Under `torchrun`, join the other processes, by NCCL on CUDA and gloo elsewhere; this one's device.

    name: None is the best there is. Of several GPUs, unless one is named by number, each process of a machine
    has its own; what is exchanged from the CPU goes by gloo everywhere. OSError if `torchrun` is gone.
    """
    device = named_device(name)
    if "RANK" in os.environ and not dist.is_initialized():
        own: dict[str, Any] = {}
        if (store := _torchrun_store()) is not None:
            rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
            own = {"store": store, "rank": rank, "world_size": world}
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **own)
    if device.type == "cuda":
        if name in (None, "cuda"):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def _torchrun_store() -> Any:
    """A `TCPStore`: where processes meet that `torchrun` has started. None without `torchrun`.

    OSError if it is gone: torch itself would wait for half an hour.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    place, patience = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=60)
    try:
        socket.create_connection(place, timeout=patience.total_seconds()).close()  # which does not try again
        store = TCPStore(*place, timeout=patience)  # in case it dies just then
    except (OSError, RuntimeError) as error:
        reason = one_line(error)
        raise OSError(f"torchrun, which started this process, cannot be reached: {reason}") from None
    store.set_timeout(default_pg_timeout)
    return store
