"""Text to token ids and back, whole or one token at a time."""

import os
from collections.abc import Sequence

import tokenizers
from tokenizers.decoders import DecodeStream

# What decoders put for bytes that are not (or not yet) UTF-8.
REPLACEMENT = "\ufffd"


class Tokenizer:
    """A model's tokenizer, read from its `tokenizer.json`."""

    def __init__(self, backend: tokenizers.Tokenizer):
        # A tokenizer.json may carry the padding and truncation of the training run; prompts want neither.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """Reads `tokenizer.json` of a model directory.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be read as a tokenizer.
        """
        path = os.path.join(directory, "tokenizer.json")
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"No tokenizer at {path}. Without it prompts must be given as token ids: "
                '{"prompt_token_ids": [...]} instead of text.'
            )
        try:
            backend = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare `Exception`
            raise ValueError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from error
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that tokenizer.json adds to a prompt.

        Raises:
            ValueError: the text has unpaired surrogates.
        """
        try:
            return self.backend.encode(text, add_special_tokens=True).ids
        except TypeError as error:  # what the library says to a str that is not UTF-8
            raise ValueError("The text has unpaired surrogates, which cannot be tokenized.") from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, unknown ids become nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """The text of one sequence, token by token, and the search for its stop strings.

    The text is that of the tokens so far, less a tail that may still change: a character some of whose bytes are
    missing. It ends before the first stop string (after it with `include_stop_str_in_output`); of several stop
    strings that a token brings, the one that begins first counts, and of those that begin together the first given.
    Once stopped, and once `finish` was called, further tokens change nothing.

    Args:
        tokenizer: the tokenizer that the tokens belong to.
        stop: strings that end the text, none of them empty; they may span tokens.
        include_stop_str_in_output: end the text after the stop string, not before it.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
    ):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._skip_special_tokens = skip_special_tokens
        self._held_back = max((len(s) for s in self._stop), default=1) - 1
        self._stream: DecodeStream | None = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._token_ids: list[int] = []
        self._finished = False
        self.text = ""
        self.stop_reason: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; it is then `stop_reason`."""
        return self.stop_reason is not None

    @property
    def stable_text(self) -> str:
        """The text that can be shown now: no stop string found later will take any of it back.

        While the sequence runs it lacks the last max(len(stop)) - 1 characters. It only ever grows, except for
        tokenizers with byte fallback when bytes that looked like text turn out to be none: they become U+FFFD.
        """
        if self._finished or not self._held_back:
            return self.text
        return self.text[: -self._held_back]

    def feed(self, token_id: int) -> str | None:
        """Appends one token; returns the stop string that ended the text, or None."""
        if not self._finished:
            self._token_ids.append(token_id)
            self._update(self._next_text(token_id))
        return self.stop_reason

    def finish(self) -> str | None:
        """Ends the sequence: the text becomes that of all its tokens, unless a stop string is in it.

        Returns the stop string that ended the text, or None.
        """
        if not self._finished:
            self._update(self._decode_all())
            self._finished = True
        return self.stop_reason

    def _next_text(self, token_id: int) -> str:
        if self._stream is not None:
            try:
                return self.text + (self._stream.step(self._tokenizer.backend, token_id) or "")
            except Exception:  # the library raises bare `Exception`
                # Byte fallback decodes a run of bytes as a whole, so a bad byte turns good ones before it into
                # U+FFFD, and the stream gives up where earlier text changes. Such sequences are rare and broken
                # anyway: decode them from the start at every token.
                self._stream = None
        return self._decode_all().rstrip(REPLACEMENT)

    def _decode_all(self) -> str:
        return self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)

    def _update(self, text: str) -> None:
        grown = text.startswith(self.text)
        search_from = max(0, len(self.text) - self._held_back) if grown else 0
        self.text = text
        found = [(position, s) for s in self._stop if (position := text.find(s, search_from)) >= 0]
        if found:
            position, self.stop_reason = min(found, key=lambda hit: hit[0])
            self.text = text[: position + len(self.stop_reason) if self._include_stop else position]
            self._finished = True
