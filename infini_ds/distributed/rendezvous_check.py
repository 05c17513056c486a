"""Whether the ranks of a run reach each other: they meet at the first one's address and add up a number."""

import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from infini_ds.distributed.environment import DistEnv
from infini_ds.utils.errors import UserError


def meet(process: DistEnv, seconds: float) -> str:
    """Let all ranks meet; returns what was found, in words.

    Raises:
        UserError: some have not come within `seconds`, or cannot compute together.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit, started = timedelta(seconds=seconds), time.monotonic()
    # torchrun's own store stands at the port already.
    hosts = process.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(address, port, process.world_size, hosts, limit, wait_for_workers=False)
        store = dist.PrefixStore("doctor", store)
        store.set(str(process.rank), socket.gethostname())
    except Exception as error:  # of several kinds, by version
        what = "cannot be listened at" if hosts else "cannot be reached"
        raise UserError(
            f"MASTER_ADDR={address} MASTER_PORT={port} {what} from {socket.gethostname()} within {seconds:g} s: start "
            "all ranks, name an address of the first node that the others reach, and a free port that is not closed"
        ) from error
    names = [str(rank) for rank in range(process.world_size)]
    while missing := [name for name in names if not store.check([name])]:
        if time.monotonic() - started > seconds:
            raise UserError(
                f"rank {', '.join(missing)} of {process.world_size} did not come to {address}:{port} in {seconds:g} s: "
                "look whether its node is up, sees that address, and has started as many ranks as the others"
            )
        time.sleep(0.05)
    backend = "nccl" if process.device.type == "cuda" else "gloo"
    try:
        if backend == "nccl":
            torch.cuda.set_device(process.device)
        dist.init_process_group(backend, store=store, rank=process.rank, world_size=process.world_size, timeout=limit)
        total = torch.full((1 << 20,), float(process.rank), device=process.device)
        dist.all_reduce(total)
        result = total[0].item()  # waits for the device
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        interface = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        raise UserError(
            f"the ranks meet, but cannot compute together by {backend} ({reason}): name the network interface that "
            f"joins the nodes in {interface}" + (", and look at what NCCL_DEBUG=INFO says" if backend == "nccl" else "")
        ) from error
    if result != sum(range(process.world_size)):
        raise UserError(f"{backend} added up the ranks to {result}, not {sum(range(process.world_size))}: its network "
                         "or its version is at fault")  # fmt: skip
    nodes = sorted({store.get(name).decode() for name in names})
    dist.barrier()
    return f"{process.world_size} ranks on {', '.join(nodes)} by {backend}, in {time.monotonic() - started:.1f} s"
