"""A script of a test's, run by two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPO

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run_in_two(
    code: str, root: Path, *arguments: str, launcher: tuple[str, ...] = TORCHRUN, timeout: int = 300
) -> None:
    """Runs `code`, whose first argument is `root`, where it is written too; the project is importable.

    Raises:
        CalledProcessError: it ended with an error.
    """
    script = root / "script.py"
    script.write_text(code)
    subprocess.run(
        [sys.executable, "-m", *launcher, str(script), str(root), *arguments],
        check=True,
        timeout=timeout,
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "DEVICE": "cpu"},
    )
