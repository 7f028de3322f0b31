"""The error a user can mend: it names the file, row or key and says what to do."""


class UserError(Exception):
    """Bad input or a bad setting; `run_stage` prints its message without a traceback and exits with 1."""
