"""Text as it comes is the text that a tokenizer makes of all tokens, without half characters and half stop strings."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from semiopen.host.serving.detokenize import TextStream, Vocabulary
from semiopen.host.serving.stops import StopScanner
from tests.serving.running_server import TOKENIZER

SPACE = "\u2581"


def sentencepiece(strip: bool) -> PreTrainedTokenizerFast:
    """A tokenizer as conversions from SentencePiece are: `strip` as Llama 2, without as Gemma."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        SPACE,
        f"{SPACE}Hello",
        "Hello",
        f"{SPACE}world",
        f"{SPACE}{SPACE}",
        "wor",
        "ld",
        "é",
        f"{SPACE}日",
        "本",
        ".",
    ]
    backend = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("a▁b", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are not bytes, so that it has to be asked."""
    pieces = ["[UNK]", "[SEP]", "the", "sta", "##tion", "##s", "is", ".", "é", "##日"]
    backend = Tokenizer(models.WordPiece({piece: place for place, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")


def gpt2_with_added_tokens() -> PreTrainedTokenizerFast:
    """Bytes in GPT-2's alphabet, with tokens added later that are in it and that are not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: place for place, piece in enumerate(alphabet)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [AddedToken("<tool>", special=False), AddedToken("a b", special=False), AddedToken("日", special=False)]
    )
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


TOKENIZERS = {
    "stories": TOKENIZER,
    "gpt2": gpt2_with_added_tokens(),
    "llama2": sentencepiece(True),
    "gemma": sentencepiece(False),
    "wordpiece": wordpiece(),
}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def streamed(name: str, tokens, before=(), special: bool = False) -> str:
    stream = TextStream(VOCABULARIES[name], before, special)
    text = "".join(stream.push(token) for token in tokens)
    assert stream.length == len(text)
    return text


def decoded(name: str, tokens, special: bool = False) -> str:
    return TOKENIZERS[name].decode(tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def token_lists(name: str):
    return st.lists(st.integers(0, VOCABULARIES[name].size - 1), max_size=24)


def without_half_character(text: str) -> str:
    """A text may end with a character that never was complete; that is not shown."""
    return text.removesuffix("\ufffd")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("special", [False, True])
def test_any_tokens_give_the_text_of_a_full_decode(name, special):
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(token_lists(name))
    def check(tokens):
        whole, shown = decoded(name, tokens, special), streamed(name, tokens, special=special)
        if name in ("llama2", "gemma") and "\ufffd" in whole:
            return  # a run of bytes decodes to nothing but U+FFFD as soon as one is wrong; we keep its good characters
        assert shown in (whole, without_half_character(whole))

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_continues_its_prompt(name):
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(token_lists(name), token_lists(name))
    def check(prompt, tokens):
        before, whole = decoded(name, prompt), decoded(name, prompt + tokens)
        if "\ufffd" in whole or "\ufffd" in before:
            return  # next test
        assert before + streamed(name, tokens, prompt) == whole

    check()


def test_a_prompt_may_end_within_a_character():
    tokens = TOKENIZER.encode("dog 🐶 end", add_special_tokens=False)
    for cut in range(len(tokens)):
        shown = streamed("stories", tokens[cut:], tokens[:cut])
        assert "\ufffd" not in shown
        assert ("dog 🐶 end").endswith(shown)


def test_half_a_character_is_never_shown():
    tokens = TOKENIZER.encode("Ünïcödé 🐶🐶 日本 €", add_special_tokens=False)
    assert any("\ufffd" in TOKENIZER.decode([token]) for token in tokens), "or this tests nothing"
    stream = TextStream(VOCABULARIES["stories"])
    parts = [stream.push(token) for token in tokens]
    assert "".join(parts) == "Ünïcödé 🐶🐶 日本 €"
    assert not any("\ufffd" in part for part in parts)


def test_good_characters_survive_a_bad_byte():
    euro = [3 + byte for byte in "€".encode()]
    assert streamed("gemma", [3 + 0xFF, *euro, euro[0]]) == "\ufffd€"


def test_llama_drops_one_leading_space_of_a_text_but_not_of_a_continuation():
    hello = TOKENIZERS["llama2"].convert_tokens_to_ids(f"{SPACE}Hello")
    assert streamed("llama2", [1, hello, hello]) == "Hello Hello"
    assert streamed("llama2", [hello], before=[1, hello]) == " Hello"
    assert streamed("llama2", [hello], before=[1]) == "Hello"


def test_tokens_without_characters_have_names_of_their_own():
    vocabulary = VOCABULARIES["gemma"]
    names = [vocabulary.name(3 + byte) for byte in range(0x80, 0x100)]
    assert names[0] == "bytes:\\x80"
    assert len(set(names)) == 128


def test_an_id_beyond_the_tokenizer_is_no_text():
    for name, vocabulary in VOCABULARIES.items():
        assert streamed(name, [vocabulary.size + 5]) == ""


def by_letter(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What a text is before its stop string, looked at letter by letter."""
    for end in range(1, len(text) + 1):
        fitting = [stop for stop in stops if text[:end].endswith(stop)]
        if fitting:
            longest = max(fitting, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.text("ab#", max_size=20),
    st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 20), max_size=6),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text, stops, cuts):
    expected, stop = by_letter(text, stops)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    scanner, shown = StopScanner(stops), ""
    for start, end in itertools.pairwise(places):
        shown += scanner.push(text[start:end])
        assert expected.startswith(shown), "a part of the stop string was shown"
        if scanner.matched:
            break
    else:
        shown += scanner.finish()
    assert (shown, scanner.matched) == (expected, stop)


def test_only_what_could_begin_a_stop_string_is_held_back():
    scanner = StopScanner(["###"])
    assert [scanner.push(part) for part in ("a#", "#b", "##", "#")] == ["a", "##b", "", ""]
    assert scanner.matched == "###"


def test_a_stop_string_can_be_included():
    scanner = StopScanner(["##"], include=True)
    assert [scanner.push(part) for part in ("a#", "#b")] == ["a", "##"]
