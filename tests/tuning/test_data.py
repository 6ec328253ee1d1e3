"""Data files: what of an example is learned, and what a mistake in a file is answered with."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from semiopen.host.tuning.data import DataError, encode, read_rows
from tests.tuning.conftest import CHAT, STORIES


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STORIES)


def examples(tmp_path, tokenizer, *rows, loss="completion", max_length=64):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return encode(read_rows(path), tokenizer, max_length, loss)


def learned_text(found, tokenizer, index=0):
    span = found.span(index)
    return tokenizer.decode(found.ids[span][found.learned[span]])


def test_text_is_learned_whole_and_ends(tmp_path, tokenizer):
    found = examples(tmp_path, tokenizer, {"text": "Zorg is a robot."})
    assert found.ids.tolist() == [*tokenizer("Zorg is a robot.")["input_ids"], tokenizer.eos_token_id]
    assert found.learned.tolist() == [False] + [True] * (found.tokens - 1)


def test_of_a_pair_the_completion_is_learned(tmp_path, tokenizer):
    pair = {"prompt": "Zorg likes", "completion": " purple soup."}
    found = examples(tmp_path, tokenizer, pair)
    prompt = tokenizer("Zorg likes")["input_ids"]
    assert found.ids[: len(prompt)].tolist() == prompt
    assert learned_text(found, tokenizer) == " purple soup.</s>"
    assert found.learned.sum() == found.tokens - len(prompt)
    assert examples(tmp_path, tokenizer, pair, loss="all").learned[1:].all()


def test_a_prompt_keeps_its_own_tokens(tmp_path, tokenizer):
    """What is asked later is the prompt alone, so its last token must not grow into the completion."""
    found = examples(tmp_path, tokenizer, {"prompt": "Once upon a ti", "completion": "me there was"})
    prompt = tokenizer("Once upon a ti")["input_ids"]
    together = tokenizer("Once upon a time there was")["input_ids"]
    assert together[: len(prompt)] != prompt, "these texts prove nothing"
    assert found.ids[: len(prompt)].tolist() == prompt
    assert learned_text(found, tokenizer) == "me there was</s>"


def test_of_a_conversation_the_assistants_turns_are_learned(tmp_path, tokenizer):
    found = examples(tmp_path, tokenizer, {"messages": [*CHAT, {"role": "user", "content": "Why?"}, *CHAT[1:]]})
    whole = tokenizer.apply_chat_template(
        [*CHAT, {"role": "user", "content": "Why?"}, *CHAT[1:]], return_dict=True, add_generation_prompt=False
    )["input_ids"]
    assert found.ids.tolist() == whole
    assert learned_text(found, tokenizer) == "Zorg eats purple soup.</s>" * 2
    first = found.learned.argmax()
    asked = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found.ids[:first].tolist() == asked, "the model must learn from where it is asked"


def test_generation_marks_of_a_template_are_used(tmp_path, tokenizer, monkeypatch):
    marked = tokenizer.chat_template.replace("{{ '<|assistant|>' + m", "{{ '<|assistant|>' }}{% generation %}{{ m")
    marked = marked.replace("trim + eos_token }}", "trim + eos_token }}{% endgeneration %}", 1)
    monkeypatch.setattr(tokenizer, "chat_template", marked)
    found = examples(tmp_path, tokenizer, {"messages": CHAT})
    assert learned_text(found, tokenizer) == "Zorg eats purple soup.</s>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m['content'] if loop.last else '...' }};{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    row = {"messages": [*CHAT, {"role": "user", "content": "Why?"}, *CHAT[1:]]}
    with pytest.raises(DataError, match=r"line 1: .*one conversation per answer, or --loss all"):
        examples(tmp_path, tokenizer, row)
    assert examples(tmp_path, tokenizer, row, loss="all").learned[1:].all()


def test_no_chat_template(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match=r"line 1: this model has no chat template"):
        examples(tmp_path, tokenizer, {"messages": CHAT})


def test_long_examples_are_cut_and_counted(tmp_path, tokenizer):
    long = {"text": "Zorg is a robot. " * 30}
    lost = {"prompt": "Zorg is a robot. " * 30, "completion": " yes"}
    found = examples(tmp_path, tokenizer, long, {"text": "Zorg."}, lost, max_length=16)
    assert (len(found), found.truncated, found.dropped) == (2, 2, 1)
    assert found.lengths[0] == 16
    with pytest.raises(DataError, match="larger --max-length"):
        examples(tmp_path, tokenizer, lost, max_length=16)


def test_a_text_file_is_cut_into_pieces(tmp_path, tokenizer):
    path = tmp_path / "story.txt"
    path.write_text("Zorg is a robot.\n\nHe likes soup. " * 20)
    found = encode(read_rows(path), tokenizer, 50, "completion")
    assert set(found.lengths[:-1]) == {50}
    assert found.truncated == 0
    pieces = [found.ids[found.span(index)] for index in range(len(found))]
    assert all(piece[0] == tokenizer.bos_token_id for piece in pieces)
    whole = np.concatenate([piece[1:] for piece in pieces]).tolist()
    assert whole == tokenizer(path.read_text(), add_special_tokens=False)["input_ids"][: len(whole)]
    assert not found.learned[found.starts[:-1]].any()


MISTAKES = {
    "{": "line 2: not JSON",
    "[1]": "line 2: not an object",
    '{"txt": "a"}': "line 2: has none of these",
    '{"text": "a", "prompt": "b"}': 'line 2: has "text" and "prompt"',
    '{"text": 3}': 'line 2: "text" is not a string',
    '{"text": ""}': 'line 2: "text" is empty',
    '{"prompt": "a"}': 'line 2: "completion" is missing',
    '{"messages": "a"}': 'line 2: "messages" must be a list',
    '{"messages": [{"role": "user", "content": "SECRET"}]}': 'line 2: no message has the role "assistant"',
    '{"messages": [{"role": "assistant", "content": ["SECRET"]}]}': 'line 2: message 1 has no "content"',
    "[" * 100_000: "line 2: ",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_name_the_line_and_not_what_stands_there(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "SECRET"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert MISTAKES[line] in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_files_that_are_no_data(tmp_path):
    for name, content, message in [
        ("rows.json", b"[]", "must end in .jsonl"),
        ("rows.jsonl", b"\n", "is empty"),
        ("story.txt", b" \n", "is empty"),
        ("story.txt", b"caf\xe9", "is not UTF-8"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_rows(tmp_path / name)


def test_line_separators_within_a_text(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
    assert len(read_rows(tmp_path / "rows.jsonl")) == 1
