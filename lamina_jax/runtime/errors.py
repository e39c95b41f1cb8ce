"""Errors of a run, as the user sees them."""


class WorkerError(RuntimeError):
    """A worker failed, died or did not answer in time; the message says which, and what it was doing."""
