"""A transfer in a process, and a network, of its own, that does what it is told over a Unix socket: `python -m … SOCKET HOST`."""

from __future__ import annotations

import sys
from multiprocessing.connection import Client

import torch

from common.messages import Shard
from services.transfer import environment
from services.transfer.ucx import UcxTransfer

PAGES, PAGE_BYTES = 4, 368_640
SHARD = Shard(0, (0, 30), (0, 3))
ALL = tuple(range(PAGES))


def serve(path: str, host: str) -> None:
    torch.set_num_threads(1)
    environment.follow(host)
    with Client(path, "AF_UNIX") as wire:
        transfer = UcxTransfer(torch.zeros((PAGES, PAGE_BYTES), dtype=torch.uint8), SHARD, wire.send)
        wire.send("ready")
        while True:
            method, arguments = wire.recv()
            getattr(transfer, method)(*arguments)
            if method == "close":
                return


if __name__ == "__main__":
    serve(*sys.argv[1:])
