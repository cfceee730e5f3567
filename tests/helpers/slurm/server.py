"""A teacher's server in a process of its own, in the place of recipes/serve_teacher.sh.

Its number is left in $FAKE_SLURM/server.
"""

import os
import signal
from pathlib import Path

from tests.helpers.fake_server import FakeServer

if __name__ == "__main__":
    FakeServer(int(os.environ["PORT"])).key = os.environ["VLLM_API_KEY"]
    (Path(os.environ["FAKE_SLURM"]) / "server").write_text(str(os.getpid()))
    signal.pause()
