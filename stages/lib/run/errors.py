"""The error a user can mend: it names the file, row or key and says what to do."""

import re


class UserError(Exception):
    """Bad input or a bad setting; `run_stage` prints its message without a traceback and exits with 1."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch ran out of memory: OutOfMemoryError on an accelerator, DefaultCPUAllocator on a CPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(re.search("out of memory|can't allocate memory", str(error)))
    )
