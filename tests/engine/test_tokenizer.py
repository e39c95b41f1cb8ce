import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lamina_jax.engine.tokenizer import REPLACEMENT, Detokenizer, Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "she sells sea shells", "天地玄黃 宇宙洪荒", "naïve café 👍🏽"]


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE as of LLaMA 3: characters beyond ASCII are mostly split across tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(backend)


def byte_fallback_tokenizer() -> Tokenizer:
    """Words with "▁" for a space and bytes for everything else, as of LLaMA 2."""
    words = ["<s>", "</s>", "<unk>", "▁", "▁a", "▁the", "b", "stop", "黃"]
    vocab = {piece: i for i, piece in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
TEXT = st.text(st.sampled_from("abst eoph洪黃é👍 \n"), max_size=30)
RAW_IDS = st.lists(st.integers(0, 264), max_size=30)


def ids_of(text: str) -> list[int]:
    return BYTE_LEVEL.encode(text)[1:]


def run(detokenizer: Detokenizer, token_ids) -> Detokenizer:
    for token_id in token_ids:
        detokenizer.feed(token_id)
    detokenizer.finish()
    return detokenizer


def expected_stop(tokenizer: Tokenizer, token_ids, stop) -> tuple[str, str | None]:
    """Decodes every prefix from scratch; text that ends amid a character cannot be seen before it is complete."""
    texts = [tokenizer.decode(token_ids[:end]) for end in range(1, len(token_ids) + 1)]
    for text in [t for t in texts if not t.endswith(REPLACEMENT)] + texts[-1:]:
        hits = [(text.index(s), order, s) for order, s in enumerate(stop) if s in text]
        if hits:
            position, _, found = min(hits)
            return text[:position], found
    return (texts or [""])[-1], None


def test_encode_adds_special_tokens_and_decode_skips_them():
    token_ids = BYTE_LEVEL.encode("the fox")
    assert token_ids[0] == 0
    assert BYTE_LEVEL.decode(token_ids) == "the fox"
    assert BYTE_LEVEL.decode(token_ids, skip_special_tokens=False) == "<s>the fox"
    assert BYTE_LEVEL.vocab_size == 300


def test_unpaired_surrogates_are_a_value_error():
    with pytest.raises(ValueError, match="surrogates"):
        BYTE_LEVEL.encode("a\ud800")


def test_from_directory_reads_without_padding_or_truncation(tmp_path):
    backend = tokenizers.Tokenizer.from_str(BYTE_LEVEL.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox jumps over the lazy dog"
    assert Tokenizer.from_directory(tmp_path).encode(text) == BYTE_LEVEL.encode(text)


def test_a_missing_file_is_named_and_so_is_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*prompt_token_ids"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"version": "1.0"'])
def test_a_corrupt_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)


@BOTH
@given(token_ids=RAW_IDS, skip=st.booleans())
def test_any_tokens_end_as_the_whole_decode(tokenizer, token_ids, skip):
    detokenizer = run(Detokenizer(tokenizer, skip_special_tokens=skip), token_ids)
    assert detokenizer.text == detokenizer.stable_text == tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert not detokenizer.stopped


@given(text=TEXT)
def test_text_grows_by_whole_characters(text):
    detokenizer = Detokenizer(BYTE_LEVEL)
    for token_id in ids_of(text):
        before = detokenizer.text
        assert detokenizer.feed(token_id) is None
        assert detokenizer.text.startswith(before)
        assert text.startswith(detokenizer.text)
    assert detokenizer.text == text  # before `finish`: whole characters are not held back


@BOTH
@given(token_ids=RAW_IDS, stop=st.lists(st.sampled_from(["stop", "t", " the", "aa", "洪", "黃b"]), max_size=3))
def test_stop_strings_in_any_tokens(tokenizer, token_ids, stop):
    detokenizer = run(Detokenizer(tokenizer, stop=stop), token_ids)
    assert (detokenizer.text, detokenizer.stop_reason) == expected_stop(tokenizer, token_ids, stop)


@given(data=st.data(), text=TEXT.filter(bool), include=st.booleans())
def test_stop_strings_that_do_occur(data, text, include):
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 6))]
    detokenizer = Detokenizer(BYTE_LEVEL, stop=[stop], include_stop_str_in_output=include)
    shown = ""
    for token_id in ids_of(text):
        detokenizer.feed(token_id)
        assert detokenizer.stable_text.startswith(shown)
        shown = detokenizer.stable_text
    detokenizer.finish()
    end = text.index(stop) + (len(stop) if include else 0)
    assert (detokenizer.text, detokenizer.stop_reason, detokenizer.stopped) == (text[:end], stop, True)
    assert detokenizer.text.startswith(shown)


def test_streaming_holds_back_what_may_be_a_stop_string():
    detokenizer = Detokenizer(BYTE_LEVEL, stop=["x", "fox!"])
    for token_id in ids_of("the fo"):
        detokenizer.feed(token_id)
    assert detokenizer.text == "the fo"
    assert detokenizer.stable_text == "the"
    detokenizer.finish()
    assert detokenizer.stable_text == "the fo"


def test_the_stop_string_that_begins_first_counts_and_then_the_first_given():
    stops = {("dog", "lazy"): "lazy", ("l", "la"): "l", ("la", "l"): "la"}
    backend = tokenizers.Tokenizer(models.WordLevel({"lazy dog": 0}))
    for stop, found in stops.items():
        detokenizer = Detokenizer(Tokenizer(backend), stop=stop)
        assert detokenizer.feed(0) == found
        assert detokenizer.text == ""


def test_tokens_after_a_stop_change_nothing():
    detokenizer = Detokenizer(BYTE_LEVEL, stop=["fox"])
    for token_id in ids_of("the fox jumps"):
        detokenizer.feed(token_id)
    assert detokenizer.feed(ids_of("a")[0]) == "fox"
    assert detokenizer.finish() == "fox"
    assert detokenizer.text == "the "


def test_bytes_that_turn_out_to_be_no_text():
    """The decoder takes back the "a" that it gave for the byte 0x61 once a bad byte follows."""
    b, stop = 6, 7
    token_ids = [byte(0x61), byte(0xE4), b, byte(0xE9), byte(0xBB), byte(0x83), b, stop]
    detokenizer = Detokenizer(BYTE_FALLBACK, stop=["stop"])
    texts = []
    for token_id in token_ids:
        detokenizer.feed(token_id)
        texts.append(detokenizer.text)
    bad = REPLACEMENT * 2
    assert texts == ["a", "a", f"{bad}b", f"{bad}b", f"{bad}b", f"{bad}b黃", f"{bad}b黃b", f"{bad}b黃b"]
    assert detokenizer.stop_reason == "stop"


def test_a_stop_string_in_text_that_changed():
    detokenizer = run(Detokenizer(BYTE_FALLBACK, stop=[REPLACEMENT * 2]), [byte(0x61)] * 5 + [byte(0xE4), 6])
    assert (detokenizer.text, detokenizer.stopped) == ("", True)


def byte(value: int) -> int:
    return 9 + value  # the byte tokens follow nine words
