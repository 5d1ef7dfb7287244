"""How a process that has ranks ends."""

import subprocess
import sys

import pytest

KEPT = """
import atexit, sys
from pathlib import Path
from fastsds import distributed

class Late:
    def __del__(self, write=Path(sys.argv[1]).write_text):
        write("the interpreter was taken down")

late = Late()
atexit.register(print, "at exit", end="")
print("said", end=" ")
JOIN
distributed.end(CODE)
"""
JOIN = "import torch; torch.distributed.init_process_group('gloo', init_method='tcp://127.0.0.1:0', rank=0, world_size=1)"


@pytest.mark.parametrize("code", [0, 2, 130])
@pytest.mark.parametrize("join", ["", JOIN], ids=["alone", "a rank"])
def test_all_is_done_at_the_end_but_the_interpreter_of_a_rank_is_not_taken_down(code, join, tmp_path):
    script = KEPT.replace("JOIN", join).replace("CODE", str(code))
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "late"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (code, "said at exit", "")
    assert (tmp_path / "late").exists() == (not join)
