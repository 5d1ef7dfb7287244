"""How a process that is one of torch.distributed's ranks ends."""

import atexit
import os
import sys
from typing import NoReturn

import torch

INTERRUPTED = 130  # a run that was asked to stop, and stopped where all ranks know it


def end(code: int) -> NoReturn:
    """Exit as `sys.exit(code)` does, and without an abort where this process has joined ranks.

    A worker thread of gloo lets go of a collective's tensors a moment after the collective is done, and needs the interpreter
    for that. An interpreter that is being taken down ends such a thread, which C++ takes for an error ("terminate called
    without an active exception"). To destroy the group does not end its threads: DeepSpeed, and what was imported since, keep
    references to it. So all that an exit does is done here, but the interpreter is not taken down, as in multiprocessing.
    """
    if not torch.distributed.is_initialized():
        sys.exit(code)
    if code in (0, INTERRUPTED):  # else other ranks may be elsewhere, and NCCL would wait for them
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
