"""Connectivity check: rendezvous and all-reduce across all ranks."""

import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from infini_ds.distributed.environment import DistEnv
from infini_ds.utils.errors import UserError, first_line


def check_rendezvous(environment: DistEnv, seconds: float) -> str:
    """Let all ranks find each other at MASTER_ADDR and sum a tensor; return ranks, hosts, backend and time as a phrase.

    Leaves the process group open.

    Raises:
        UserError: ranks are missing after `seconds`, or cannot communicate.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit, started = timedelta(seconds=seconds), time.monotonic()
    # Under torchrun a store listens at the port already.
    is_host = environment.is_rank_zero and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        tcp_store = dist.TCPStore(address, port, environment.world_size, is_host, limit, wait_for_workers=False)
        store = dist.PrefixStore("doctor", tcp_store)
        store.set(str(environment.rank), socket.gethostname())
    except Exception as error:  # its type differs between versions of torch
        what = "cannot be listened at" if is_host else "cannot be reached"
        raise UserError(
            f"MASTER_ADDR={address} MASTER_PORT={port} {what} from {socket.gethostname()} within {seconds:g} s: start "
            "all ranks, and give an address of the first node that the others reach, with a free, open port"
        ) from error
    names = [str(rank) for rank in range(environment.world_size)]
    while missing := [name for name in names if not store.check([name])]:
        if time.monotonic() - started > seconds:
            raise UserError(
                f"rank {', '.join(missing)} of {environment.world_size} did not reach {address}:{port} in {seconds:g} "
                "s: check that its node is up, resolves that address, and has started as many ranks as the others"
            )
        time.sleep(0.05)
    backend = "nccl" if environment.device.type == "cuda" else "gloo"
    try:
        if backend == "nccl":
            torch.cuda.set_device(environment.device)
        dist.init_process_group(
            backend, store=store, rank=environment.rank, world_size=environment.world_size, timeout=limit
        )
        total = torch.full((1 << 20,), float(environment.rank), device=environment.device)
        dist.all_reduce(total)
        result = total[0].item()  # waits for the device
    except Exception as error:
        interface = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        raise UserError(
            f"the ranks find each other, but cannot communicate by {backend} ({first_line(error)}): name the network "
            f"interface that connects the nodes in {interface}"
            + (", and see the output of NCCL_DEBUG=INFO" if backend == "nccl" else "")
        ) from error
    expected = sum(range(environment.world_size))
    if result != expected:
        raise UserError(
            f"all-reduce by {backend} gave {result:g} instead of {expected}: use another version of {backend}, or "
            "check the network"
        )
    nodes = sorted({store.get(name).decode() for name in names})
    dist.barrier()
    return f"{environment.world_size} ranks on {', '.join(nodes)} by {backend}, in {time.monotonic() - started:.1f} s"
