"""The lab's skills: splits that share nothing, right answers, and scores that mean what they say."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lab import train_lab
from lab.skills import ASKED, PRIVATE, Prompt, Skills, bits_per_byte, complete, encode, exact_match, pack, pad

SPLITS = ("train", "attack", "eval")
STORIES = [f"Once upon a time, {n} little dogs saw {n * 7} red balls. They were happy." for n in range(40)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "tinystories-sample").mkdir()
    (folder / "tinystories-sample" / "tinystories.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    return folder


@pytest.fixture(scope="module")
def skills(texts: Path) -> Skills:
    return Skills(texts)


@pytest.fixture(scope="module")
def tokenizer(skills: Skills):
    return train_lab.train_tokenizer(skills)


class Knows:
    """A stand-in for a model that foresees each token of the documents it was given, and after a prompt of
    `wrong_at` another than the right one."""

    def __init__(self, vocabulary: int, wrong_at: int | None = None) -> None:
        self.vocabulary, self.wrong_at = vocabulary, wrong_at

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        following = input_ids.roll(-1, dims=1)
        if self.wrong_at is not None:
            ends = attention_mask.sum(1) - 1 + self.wrong_at
            following[torch.arange(len(ends)), ends] += 1
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following % self.vocabulary, self.vocabulary) * 9.0)


def test_no_prompt_and_no_story_is_in_two_splits(skills):
    for one, other in itertools.combinations(SPLITS, 2):
        for skill in ASKED:
            mine = {p.text for p in skills.prompts(skill, one)}
            assert mine
            assert mine.isdisjoint(p.text for p in skills.prompts(skill, other))
        assert set(skills.stories(one)).isdisjoint(skills.stories(other))
    assert sum(len(skills.stories(split)) for split in SPLITS) == len(STORIES)


def test_a_sum_and_its_mirror_are_in_one_split(skills):
    for split in SPLITS:
        asked = {p.text for p in skills.prompts("arithmetic_base", split)}
        assert asked == {"{1}+{0}=".format(*text[:-1].split("+")) for text in asked}


def test_letters_of_eval_are_in_no_instruction_elsewhere(skills):
    def letters(split):
        asked = [p for s in ("instructions_base", "instructions_private") for p in skills.prompts(s, split)]
        return {p.text.split("\n")[0].rsplit(":")[-1] for p in asked}

    assert letters("eval").isdisjoint(letters("train") | letters("attack"))


def test_facts_of_eval_are_known_from_training_and_private_ones_from_private_training_only(skills):
    def known(skill, split):
        return {(p.kind, name_of(p), p.answer) for p in skills.prompts(skill, split)}

    for skill in ("facts_base", "facts_private"):
        assert known(skill, "eval") == known(skill, "train") == known(skill, "attack")
    names = [{name for _, name, _ in known(skill, "train")} for skill in ("facts_base", "facts_private")]
    assert names[0].isdisjoint(names[1])


def name_of(prompt: Prompt) -> str:
    starts = {"Question", "What", "Tell", "Which", "The", "Name", "Say", "Answer"}
    words = prompt.text.replace("?", " ").replace(",", " ").replace(".", " ").replace(":", " ").split()
    return next(w for w in words if w[0].isupper() and w not in starts)


def test_answers_are_right(skills):
    for p in skills.prompts("arithmetic_base", "eval") + skills.prompts("arithmetic_private", "eval"):
        a, b = map(int, p.text[:-1].split(p.kind))
        assert int(p.answer) == (a + b if p.kind == "+" else a - b)
    reverse = next(p for p in skills.prompts("instructions_base", "eval") if p.kind.startswith("reverse"))
    asked = reverse.text.split("\n")[0].rsplit(":")[-1].split()
    assert reverse.answer.split() == asked[::-1]


def test_the_same_seed_gives_the_same_and_another_seed_gives_others(texts, skills):
    again, other = Skills(texts), Skills(texts, seed=1)
    for skill in ASKED:
        assert again.prompts(skill, "eval", 5) == skills.prompts(skill, "eval", 5) != other.prompts(skill, "eval", 5)


def test_prompt_and_answer_fall_into_the_same_tokens_apart_as_together(skills, tokenizer):
    for skill in ASKED:
        for p in skills.prompts(skill, "eval", 50):
            together = encode(tokenizer, [p.text + p.answer])[0]
            assert together == [*encode(tokenizer, [p.text], end=False)[0], *encode(tokenizer, [p.answer])[0][1:]]


def test_packed_rows_hold_the_documents(skills, tokenizer):
    rows = pack(skills.documents("attack", {"arithmetic_private": 1}), tokenizer, length=50, count=4)
    assert rows.shape == (4, 50)
    assert rows.dtype == torch.int64
    problems = tokenizer.decode(rows.flatten()).split("</s>")[:-1]
    right = {p.text + p.answer for p in skills.prompts("arithmetic_private", "attack")}
    assert {problem.replace("<s>", "").strip() for problem in problems} <= right


def test_a_victims_answers_replace_the_right_ones(skills):
    asked = skills.prompts("facts_private", "attack", 3)
    given = {p.text: " nothing" for p in asked}
    documents = skills.documents("attack", {"facts_private": 1}, answers=given)
    assert {next(documents) for _ in range(40)} == {p.text + " nothing" for p in asked}


def test_without_texts_stories_cannot_be_drawn():
    with pytest.raises(ValueError, match="text"):
        next(Skills(None).documents("train", {"text": 1}))


def test_score_is_one_for_a_model_that_knows_and_zero_where_one_token_is_wrong(skills, tokenizer):
    prompts = skills.prompts("instructions_private", "eval", 90)
    assert exact_match(Knows(len(tokenizer)), tokenizer, prompts, rows=7) == 1
    for place in (-1, -2):  # the end mark, the last letter
        assert exact_match(Knows(len(tokenizer), wrong_at=place), tokenizer, prompts, rows=7) == 0


def test_one_pass_scores_what_greedy_decoding_writes(skills, tokenizer):
    """A model trained on nothing but six prompts answers those; both ways of scoring agree on which."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    prompts = skills.prompts("facts_base", "eval", 12) + skills.prompts("arithmetic_base", "eval", 4)
    ids, mask = pad(encode(tokenizer, (p.text + p.answer for p in prompts[:6])), tokenizer)
    labels = ids.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    written = complete(model, tokenizer, [p.text for p in prompts], rows=5)
    expected = [float(written[p.text] == p.answer) for p in prompts]
    assert [exact_match(model, tokenizer, [p]) for p in prompts] == expected
    assert exact_match(model, tokenizer, prompts, rows=5) == sum(expected) / len(expected) > 0.2
    assert not all(expected)


def test_bits_per_byte_of_a_model_without_knowledge_is_its_tokens_times_log_vocabulary(tokenizer):
    story = "The dog saw a ball. " * 60  # several windows
    tokens = len(encode(tokenizer, [story])[0]) - 1
    assert tokens > 300

    def uniform(input_ids, attention_mask):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(tokenizer)))

    expected = tokens * math.log2(len(tokenizer)) / len(story)
    assert bits_per_byte(uniform, tokenizer, [story, story]) == pytest.approx(expected, rel=1e-5)


def test_no_base_operation_answers_a_private_instruction(skills):
    answers: dict[str, set[str]] = {}
    for p in skills.prompts("instructions_base", "eval"):
        answers.setdefault(p.text.split("\n")[0].rsplit(":")[-1], set()).add(p.answer)
    for p in skills.prompts("instructions_private", "eval"):
        assert p.answer not in answers[p.text.split("\n")[0].rsplit(":")[-1]]


def test_chance_is_low(skills):
    assert all(0 < value <= 0.11 for value in skills.chance("eval").values())
    assert set(skills.chance("eval")) == set(ASKED) > set(PRIVATE)
