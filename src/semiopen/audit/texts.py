"""The token sequences that plans and audits are made with: from a file of texts, or sampled from the model itself."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from semiopen.errors import SemiopenError

SEQUENCE_TOKENS = 128
_PIECE = 20_000  # characters of a text without marks between its documents that count as one document
_SAMPLED_AT_ONCE = 64
_MOST_FOR_EXAM = 4  # an exam takes a quarter of the documents at most


def read_texts(path: Path, model_folder: Path, most: int, seed: int) -> torch.Tensor:
    """Sequences of `SEQUENCE_TOKENS` from a file, documents in random order, each tokenised as the tokenizer likes.

    Args:
        path: JSONL (`.jsonl`, `.json`: one object per line; its field `text`, else all its strings) or plain text
            (documents between lines `<|endoftext|>`, if it has such lines).
        model_folder: where the tokenizer is.
        most: sequences to return at most.
        seed: of the order.

    Returns:
        [N, T] int64, N from 1 to `most`.

    Raises:
        SemiopenError: unreadable, no tokenizer, or too little text for one sequence.
    """
    tokenizer = _tokenizer(model_folder)
    documents = list(_documents(path))
    random.Random(seed).shuffle(documents)  # noqa: S311 - an order, no secret
    tokens = _tokens(tokenizer, documents, most)
    if len(tokens) < SEQUENCE_TOKENS:
        raise SemiopenError(f"{path} has {len(tokens)} tokens; give texts of at least {SEQUENCE_TOKENS}.")
    return _sequences(tokens, most)


def read_apart(path: Path, model_folder: Path, queries: int, exam: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences from a file, documents in random order: the first for queries, the last for the exam.

    A document that the file holds twice is taken once, so that no exam is known from queries.

    Args:
        path: see `read_texts`.
        model_folder: where the tokenizer is.
        queries: sequences of `SEQUENCE_TOKENS` to return at most; which, depends neither on this number nor on `exam`.
        exam: the same for the exam.
        seed: of the order.

    Returns:
        [N, T] and [M, T] int64, at least one sequence each.

    Raises:
        SemiopenError: unreadable, no tokenizer, or too little text.
    """
    tokenizer = _tokenizer(model_folder)
    documents = list(dict.fromkeys(document for document in _documents(path) if document.strip()))
    random.Random(seed).shuffle(documents)  # noqa: S311 - an order, no secret
    held = max(1, len(documents) // _MOST_FOR_EXAM)
    asked, marked = documents[:-held], documents[-held:]
    parts = (
        _sequences(_tokens(tokenizer, asked, queries), queries),
        _sequences(_tokens(tokenizer, marked[::-1], exam), exam),
    )
    if not all(len(part) for part in parts):
        raise SemiopenError(
            f"{path} has too little text: the queries and the exam need at least {SEQUENCE_TOKENS} tokens each, from "
            f"different documents, and it has {len(documents)} of them; give more texts, or leave --texts out."
        )
    return parts


@torch.inference_mode()
def sample_texts(model: PreTrainedModel, count: int, seed: int) -> torch.Tensor:
    """What the model writes by itself at temperature 1: `count` sequences [N, T] int64.

    Each begins with the beginning-of-text token, or a random one where the model has none, and goes on past ends of
    text. A model's own texts are those that it finds easiest, and those that a thief without data would use.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(config.vocab_size, (count, 1), generator=generator)
    if (start := _start_token(config)) is not None:
        first.fill_(start)
    return torch.cat([_continue(model, part, generator) for part in first.split(_SAMPLED_AT_ONCE)])


def _continue(model: PreTrainedModel, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    cache, new = None, ids
    while ids.shape[1] < SEQUENCE_TOKENS:
        output = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        new = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, new], 1)
    return ids


def _start_token(config: PreTrainedConfig) -> int | None:
    token = config.bos_token_id
    return token if isinstance(token, int) and 0 <= token < config.vocab_size else None


def _tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model_folder)
    except Exception as error:  # whatever a folder without a usable tokenizer makes transformers raise
        raise SemiopenError(
            f"{model_folder} has no tokenizer for the texts ({type(error).__name__}); add its files, or leave --texts "
            "out."
        ) from None


def _tokens(tokenizer: PreTrainedTokenizerBase, documents: list[str], most: int) -> list[int]:
    """Ids of documents one after the other, until there are enough for `most` sequences."""
    tokens: list[int] = []
    for document in documents:
        if len(tokens) >= most * SEQUENCE_TOKENS:
            break
        tokens += tokenizer(document, verbose=False)["input_ids"]  # longer than the context is no fault here
    return tokens


def _sequences(tokens: list[int], most: int) -> torch.Tensor:
    """[N, T] int64, N at most `most`."""
    count = min(most, len(tokens) // SEQUENCE_TOKENS)
    return torch.tensor(tokens[: count * SEQUENCE_TOKENS], dtype=torch.int64).view(count, SEQUENCE_TOKENS)


def _documents(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SemiopenError(f"{path} cannot be read ({type(error).__name__}); give a text or JSONL file.") from None
    if path.suffix in (".jsonl", ".json"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _text_of(line, f"{path}, line {number}")
        return
    for part in text.split("\n<|endoftext|>\n"):
        yield from (part[start : start + _PIECE] for start in range(0, len(part), _PIECE))


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise SemiopenError(f"{where} is not a JSON object; give one object per line.")
    if isinstance(record.get("text"), str):
        return record["text"]
    strings = [value for value in record.values() if isinstance(value, str)]
    if not strings:
        raise SemiopenError(f"{where} holds no text; give each object a field named text.")
    return "\n".join(strings)
