"""Token ids to text as they come, byte by byte: half a character is held back, never shown as U+FFFD.

Each token stands for some bytes, whatever its neighbours are; only the first of a text may lose a leading space. So
a text is its tokens' bytes, decoded incrementally, at constant cost per token. The two ways in which decoder models'
tokenizers write bytes (GPT-2's alphabet, and SentencePiece's `<0x0A>`) are read from the tokenizer; from any other
tokenizer the text of each token is asked.
"""

import codecs
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

SPACE = "▁"  # SentencePiece's mark for a space


@cache
def _gpt2_bytes() -> dict[str, int]:
    """The byte that each character of GPT-2's alphabet stands for: printable ones themselves, others from U+0100 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(others)}


class Vocabulary:
    """The bytes of each token of a tokenizer.

    Attributes:
        size: one more than the largest token id.
        special: ids of the tokens that are not text, such as the end of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.size = max(tokenizer.get_vocab().values()) + 1
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = frozenset(
            {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        )
        steps = _decoder_steps(tokenizer)
        kinds = [step["type"] for step in steps]
        self._replace: list[tuple[str, str]] = []
        self._strips_first_space = False
        self._anchor: tuple[int, str] | None = None
        if kinds == ["ByteLevel"]:
            self._read = self._gpt2
        elif _is_sentencepiece(steps):
            self._replace = [
                (step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"
            ]
            self._strips_first_space = kinds[-1] == "Strip"
            self._read = self._sentencepiece
        else:
            self._anchor = self._find_anchor()
            self._read = self._asked
        self._known: dict[int, bytes] = {}
        self._names: dict[int, str] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token that is not the first of its text; none for an id that no token has."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._read(token_id)
        return known

    def first_bytes_of(self, token_id: int) -> bytes:
        """The bytes of the first token of a text."""
        if self._anchor is not None:
            return self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False).encode()
        return self.bytes_of(token_id).removeprefix(b" ") if self._strips_first_space else self.bytes_of(token_id)

    def name(self, token_id: int) -> str:
        """The token as text, or as OpenAI writes bytes that are no characters: `bytes:\\xe2\\x82`."""
        name = self._names.get(token_id)
        if name is None:
            data = self.bytes_of(token_id)
            try:
                name = data.decode()
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._names[token_id] = name
        return name

    def has_text(self, token_ids: Sequence[int], special: bool) -> bool:
        """Whether any of the tokens shows; `special` tokens do or not."""
        return any((special or token not in self.special) and self.bytes_of(token) for token in token_ids)

    def _token(self, token_id: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(token_id) or "" if token_id < self.size else ""

    def _gpt2(self, token_id: int) -> bytes:
        token, alphabet = self._token(token_id), _gpt2_bytes()
        if all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        return token.encode()  # a token added later, which is its own text

    def _sentencepiece(self, token_id: int) -> bytes:
        token = self._token(token_id)
        for pattern, content in self._replace:
            token = token.replace(pattern, content)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.encode()

    def _find_anchor(self) -> tuple[int, str]:
        """A token behind which others can be decoded, so that they are not the first of a text."""
        for token_id in range(self.size):
            text = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
            if token_id not in self.special and text.isascii() and text.isalnum():
                return token_id, text
        raise ValueError("The tokenizer has no plain token, so its texts cannot be taken apart.")

    def _asked(self, token_id: int) -> bytes:
        assert self._anchor is not None
        anchor, text = self._anchor
        if not self._token(token_id):
            return b""
        both = self._tokenizer.decode([anchor, token_id], clean_up_tokenization_spaces=False)
        return both.removeprefix(text).encode()


def _decoder_steps(tokenizer: Any) -> list[dict[str, Any]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _is_sentencepiece(steps: list[dict[str, Any]]) -> bool:
    """Replace..., ByteFallback, Fuse, maybe Strip of one leading space: how conversions from SentencePiece decode."""
    kinds = [step["type"] for step in steps]
    replaces = kinds.count("Replace")
    if kinds[replaces:] not in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return False
    if any("String" not in step["pattern"] for step in steps[:replaces]):
        return False
    last = steps[-1]
    return last["type"] != "Strip" or (last["content"], last["start"], last["stop"]) == (" ", 1, 0)


class TextStream:
    """The text of tokens as they come.

    Attributes:
        length: characters so far.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] = (), special: bool = False) -> None:
        """Begin behind the tokens `before`; `special` shows special tokens as their names."""
        self._vocabulary = vocabulary
        self._hidden = frozenset() if special else vocabulary.special
        self._first = not vocabulary.has_text(before, special)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.length = 0
        # The prompt may end within a character. No character has more than four bytes.
        tail = b""
        for token in reversed(before):
            if len(tail) >= 4:
                break
            if token not in self._hidden:
                tail = vocabulary.bytes_of(token) + tail
        self._decode(tail)

    def push(self, token_id: int) -> str:
        """The text that a token completes. Bytes that cannot be part of a character become U+FFFD."""
        if token_id in self._hidden:
            return ""
        if self._first:
            data = self._vocabulary.first_bytes_of(token_id)
            self._first = not self._vocabulary.bytes_of(token_id)
        else:
            data = self._vocabulary.bytes_of(token_id)
        text = self._decode(data)
        self.length += len(text)
        return text
