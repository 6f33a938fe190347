"""Two processes that run a command as `torchrun` would."""

from __future__ import annotations

import os
import socket

import torch

from graphfold.cli import main


def two_processes(arguments):
    """Exit codes of a command that two processes run together."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    running = [_forked(rank, environment, arguments) for rank in (0, 1)]
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in running]


def _forked(rank, environment, arguments):
    """One of them; importing torch again takes seconds."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            code = main(arguments)
        finally:
            os._exit(code)
    return process
