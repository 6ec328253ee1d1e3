"""Private data as examples: token ids, and which of them are to be learned.

Messages name a file, a line and a field, never what stands in them.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from semiopen.errors import SemiopenError

Loss = Literal["completion", "all"]

_TEXT_FILES = (".txt", ".md")
_JSON_LINES = (".jsonl", ".ndjson")
_SHAPES = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # templates with it mark the assistant's tokens


class DataError(SemiopenError):
    """A data file cannot be used; the message names the line and what to change."""


@dataclass(frozen=True)
class Row:
    """One line of a data file, or a whole text file. Exactly one of the three is given.

    Attributes:
        place: file and line, for messages.
        text: all of it is learned.
        pair: prompt and completion.
        messages: a conversation, for the chat template.
        stream: a text file: cut into pieces, not truncated.
    """

    place: str
    text: str | None = None
    pair: tuple[str, str] | None = None
    messages: list[dict[str, str]] | None = None
    stream: bool = False


@dataclass(frozen=True)
class Examples:
    """N examples of T tokens in all, one after the other.

    Attributes:
        ids: [T] int32 token ids.
        learned: [T] bool, whether a token counts in the loss; never an example's first, which nothing predicts.
        starts: [N + 1] int64, where each example begins; the last entry is T.
        truncated: examples that were longer than allowed and lost their end.
        dropped: examples left out, as nothing of them could be learned.
    """

    ids: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return int(self.starts[-1])

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each example."""
        return np.diff(self.starts)

    def span(self, index: int) -> slice:
        """Where the tokens of one example lie."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def ids_digest(self) -> str:
        """SHA-256 (hex) of what the enclave is given: ids and where examples begin."""
        return hashlib.sha256(self.starts.tobytes() + self.ids.tobytes()).hexdigest()

    def digest(self) -> str:
        """SHA-256 (hex) of ids, beginnings and what is learned."""
        return hashlib.sha256(self.ids_digest().encode() + self.learned.tobytes()).hexdigest()


def read_rows(path: Path) -> list[Row]:
    """Read a data file without a tokenizer, so that a mistake in it shows at once.

    Args:
        path: JSON Lines (.jsonl), one example per line in any of the three shapes; or a text file (.txt).

    Raises:
        DataError: not such a file; the message names the line.
        OSError: it cannot be read.
    """
    if path.suffix not in (*_TEXT_FILES, *_JSON_LINES):
        raise DataError(f"{path} must end in .jsonl (one JSON object per line) or .txt (plain text); rename it.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it, as with iconv -t UTF-8.") from None
    if path.suffix in _TEXT_FILES:
        if not text.strip():
            raise DataError(f"{path} is empty; give a file with text.")
        return [Row(str(path), text=text, stream=True)]
    # Not splitlines: JSON strings may hold other line separators as they are.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty; give one JSON object per line, such as {_SHAPES}.")
    return [_row(f"{path}, line {number}", line) for number, line in lines]


def _row(place: str, line: str) -> Row:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON (column {error.colno}); write one whole object per line.") from None
    except RecursionError:
        raise DataError(f"{place}: nested too deeply; write {_SHAPES}.") from None
    if not isinstance(data, dict):
        raise DataError(f"{place}: not an object; write {_SHAPES}.")
    shapes = [name for name in ("text", "prompt", "messages") if name in data]
    if len(shapes) != 1:
        found = " and ".join(f'"{name}"' for name in shapes) or "none of these"
        raise DataError(f"{place}: has {found}; write exactly one of {_SHAPES}.")
    if "text" in data:
        return Row(place, text=_string(place, data, "text"))
    if "prompt" in data:
        return Row(place, pair=(_string(place, data, "prompt"), _string(place, data, "completion")))
    return Row(place, messages=_messages(place, data["messages"]))


def _string(place: str, data: dict[str, Any], field: str) -> str:
    value = data.get(field)
    if not isinstance(value, str) or not value:
        kind = "is missing" if field not in data else "is empty" if value == "" else "is not a string"
        raise DataError(f'{place}: "{field}" {kind}; give a text.')
    return value


def _messages(place: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError(f'{place}: "messages" must be a list of objects with "role" and "content".')
    for number, message in enumerate(value, 1):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise DataError(f'{place}: message {number} has no "{field}" that is a string; give one.')
    if not any(message["role"] == "assistant" for message in value):
        raise DataError(f'{place}: no message has the role "assistant", so there is nothing to learn; add one.')
    return [{"role": message["role"], "content": message["content"]} for message in value]


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, loss: Loss) -> Examples:
    """Turn rows into examples.

    Texts and completions end with the model's end token, so that the model learns to stop. A text file is one stream,
    cut into examples of `max_length` tokens.

    Args:
        rows: from `read_rows`.
        tokenizer: the bundle's.
        max_length: longest example, in tokens; what is longer loses its end.
        loss: `completion`: of pairs the completion is learned, of conversations the assistant's turns; `all`: all.

    Raises:
        DataError: there is no chat template or it refuses a conversation, or nothing is left to learn.
    """
    if max_length < 2:
        raise ValueError("Examples need at least 2 tokens; give --max-length 2 or more.")
    pieces: list[tuple[list[int], list[bool]]] = []
    truncated = dropped = 0
    with _without_length_warnings():
        for row in rows:
            ids, learned = _encode_row(row, tokenizer, loss)
            if row.stream:
                cut = _cut(ids, max_length, tokenizer)
                pieces += [(piece, [False] + [True] * (len(piece) - 1)) for piece in cut]
                continue
            truncated += len(ids) > max_length
            ids, learned = ids[:max_length], [False, *learned[1:max_length]]
            if any(learned):
                pieces.append((ids, learned))
            else:
                dropped += 1
    if not pieces:
        raise DataError(
            f"No example has a token to learn within its first {max_length} tokens; give a larger --max-length, or "
            "shorter prompts."
        )
    return Examples(
        ids=np.fromiter((token for ids, _ in pieces for token in ids), dtype=np.int32),
        learned=np.fromiter((mark for _, marks in pieces for mark in marks), dtype=np.bool_),
        starts=np.cumsum([0, *(len(ids) for ids, _ in pieces)], dtype=np.int64),
        truncated=truncated,
        dropped=dropped,
    )


def _encode_row(row: Row, tokenizer: PreTrainedTokenizerBase, loss: Loss) -> tuple[list[int], list[bool]]:
    if row.messages is not None:
        ids, learned = _encode_chat(row.place, row.messages, tokenizer, loss)
    elif row.pair is not None:
        prompt, completion = row.pair
        begin = _without_end(_ids(tokenizer, prompt), tokenizer)
        whole = _ids(tokenizer, prompt + completion)
        if whole[: len(begin)] != begin:  # the prompt must be the tokens that it is when it is asked
            whole = begin + _ids(tokenizer, completion, add_special_tokens=False)
        ids = _with_end(whole, tokenizer)
        learned = [place >= len(begin) for place in range(len(ids))]
    else:
        ids = _ids(tokenizer, row.text or "")
        ids = ids if row.stream else _with_end(ids, tokenizer)
        learned = [True] * len(ids)
    return ids, [True] * len(ids) if loss == "all" else learned


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, **options)["input_ids"])  # type: ignore[call-overload]


def _with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end: Any = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _cut(ids: list[int], max_length: int, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Pieces of a stream, each with the beginning token that the tokenizer gives a text."""
    begin = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
    rest, room = ids[len(begin) :], max_length - len(begin)
    pieces = [begin + rest[at : at + room] for at in range(0, len(rest), room)]
    return [piece for piece in pieces if len(piece) > 1]


def _encode_chat(
    place: str, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, loss: Loss
) -> tuple[list[int], list[bool]]:
    template = tokenizer.chat_template
    if not template:
        raise DataError(
            f'{place}: this model has no chat template for "messages"; write {{"prompt": ..., "completion": ...}}.'
        )

    def render(upto: int, ask: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=ask)  # type: ignore[return-value]
        except (TemplateError, TypeError, ValueError):
            raise DataError(
                f"{place}: the model's chat template refuses this conversation; many want user and assistant in turn, "
                "and a system message only at the beginning."
            ) from None

    text = render(len(messages))
    if loss == "completion" and isinstance(template, str) and _GENERATION_MARK.search(template):
        marked: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])  # type: ignore[call-overload]
    if loss == "all":
        return ids, [True] * len(ids)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = render(turn, ask=True), render(turn + 1)
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise DataError(
                f"{place}: the model's chat template writes earlier turns differently once later ones follow, so "
                "the assistant's tokens cannot be told apart; give one conversation per answer, or --loss all."
            )
        spans.append((len(asked), len(answered)))
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]  # type: ignore[assignment, call-overload]
    return ids, [any(begin <= start < end for begin, end in spans) for start, _ in offsets]


class _without_length_warnings:  # noqa: N801 - reads as a function
    """Keep tokenizers from warning of texts longer than the context: they are cut here."""

    def __enter__(self) -> None:
        self._verbosity = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        logging.set_verbosity(self._verbosity)
