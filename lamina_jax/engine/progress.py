"""Progress of a run on stderr: requests finished, and tokens a second."""

import io
import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

# Between lines, in seconds, where there is no terminal to redraw.
LINE_INTERVAL = 10.0


class Progress:
    """Counts finished requests and tokens; a bar on a terminal, now and then a line elsewhere (log files).

    A context manager: leaving it ends the bar, or prints the last line.

    Args:
        total: number of requests, None if it is not known.
        use_tqdm: False shows nothing.
        file: where to; stderr as it is at the time, by default.
        clock: seconds, for rates.
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        use_tqdm: bool = True,
        file: TextIO | io.TextIOBase | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._file = sys.stderr if file is None else file
        self._clock = clock
        self._start = self._last_line = clock()
        self._total = total
        self._finished = self._prompt_tokens = self._decode_tokens = 0
        self._lines = use_tqdm and not self._file.isatty()
        # miniters=0: rates are redrawn while no request finishes.
        self._bar = tqdm(
            total=total,
            desc="Requests",
            unit="req",
            file=self._file,
            miniters=0,
            mininterval=0.5,
            disable=not use_tqdm or self._lines,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def add(self, *, finished: int = 0, prompt_tokens: int = 0, decode_tokens: int = 0) -> None:
        """Counts what was done since the last call: requests finished, tokens of prompts run, tokens generated."""
        self._finished += finished
        self._prompt_tokens += prompt_tokens
        self._decode_tokens += decode_tokens
        if self._lines:
            if self._clock() - self._last_line >= LINE_INTERVAL:
                self._print_line()
        elif not self._bar.disable:
            # The bar redraws at its own pace; setting the text must not force it to.
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(finished)

    def close(self) -> None:
        """Ends the bar, or prints the last line. Further calls do nothing."""
        if self._lines:
            self._print_line()
            self._lines = False
        elif not self._bar.disable:
            self._bar.set_postfix_str(self._rates())
            self._bar.close()

    def _rates(self) -> str:
        seconds = max(self._clock() - self._start, 1e-9)
        prompt, decode = self._prompt_tokens / seconds, self._decode_tokens / seconds
        return f"prompt {prompt:.1f} tok/s, decode {decode:.1f} tok/s"

    def _print_line(self) -> None:
        self._last_line = self._clock()
        of_total = "" if self._total is None else f"/{self._total}"
        print(f"Requests: {self._finished}{of_total}, {self._rates()}", file=self._file, flush=True)
