"""Compiled programs that one session leaves to the next."""

from collections.abc import Hashable
from typing import Any


class KeptPrograms:
    """Compiled programs of a session, for the next one if that is like it.

    A program names channels by number. Those of a session on CPUs have the numbers of the session before, if it has as
    many, so that after a failure nothing need be compiled again; channels between GPUs have new ones every time.
    """

    def __init__(self) -> None:
        self._setting: Hashable = None
        self._programs: dict[Any, Any] = {}

    def of(self, setting: Hashable) -> dict[Any, Any]:
        """A session's programs, to add to.

        Args:
            setting: all that the programs are compiled for, but for what tells those of one session apart.

        Returns:
            What the session before had compiled, if its setting was equal; otherwise nothing yet, and that is freed.
        """
        if setting != self._setting:
            self._setting, self._programs = setting, {}
        return self._programs
