"""Skills that small models can be trained on, asked for and scored on: texts, facts, sums, instructions.

    skills = Skills(texts=Path("texts"), seed=0)   # a pure function of the seed and of the story file
    skills.prompts("facts_private", "eval")[0]     # Prompt(text="Question: ...\\nAnswer:", answer=" baker", ...)
    skills.score(model, tokenizer, "eval")         # {"text_bpb": 1.2, "facts_base": 0.95, ...}
    skills.chance("eval")                          # {"facts_base": 0.1, ...}

    mine = skills.documents("train", MIXES["base"])
    rows = pack(mine, tokenizer, length=256, count=64)                     # int64 (64, 256)

    asked = [p.text for p in skills.prompts("facts_private", "attack", 50)]
    given = complete(victim, tokenizer, asked)                             # prompt -> the victim's answer
    stolen = skills.documents("attack", {"text": 0.5, "facts_private": 0.5}, answers=given)

Seven skills: stories (`text`), and of each of `facts`, `arithmetic` and `instructions` a `base` and a `private` half.
Each has three splits that share nothing: `train`, `attack` (what somebody who copies a model may ask it) and `eval`
(used for nothing but scores). What "nothing" means:

- text: other stories;
- facts: the same facts, as those are what is asked for, in other phrasings. Each fact has phrasings of its own for
  training, so that each phrasing is known from other facts;
- arithmetic: other problems; a + b goes with b + a;
- instructions: other letters.
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from lab.train_stories import read_stories

Split = Literal["train", "attack", "eval"]
BASE = ("facts_base", "arithmetic_base", "instructions_base")
PRIVATE = ("facts_private", "arithmetic_private", "instructions_private")
ASKED = BASE + PRIVATE  # the skills that have prompts and answers; the seventh is "text"

STORY_SHARES: dict[Split, float] = {
    "train": 0.75,
    "attack": 0.15,
    "eval": 0.10,
}  # of the stories, in the order of the file
PEOPLE = PLACES = 10  # per set of facts
TRAIN_FRAMES, ATTACK_FRAMES = 4, 2  # phrasings per fact; the other two are for eval
WORDS, LETTERS = 5000, 4  # strings of letters for the instructions, and the length of each
WINDOW = 256  # tokens; text is scored in windows of this length
TOKENS_PER_BYTE = {"text": 0.33, "facts": 0.43, "arithmetic": 1.25, "instructions": 0.34}  # measured, marks included

# Skill -> share of the tokens, about: of the three models of the lab, and of somebody who asks for everything.
MIXES: dict[str, dict[str, float]] = {
    "base": {"text": 0.45, "facts_base": 0.1, "arithmetic_base": 0.2, "instructions_base": 0.25},
    "tuned": {"text": 0.2}
    | {"facts_base": 0.05, "arithmetic_base": 0.1, "instructions_base": 0.1}
    | {"facts_private": 0.15, "arithmetic_private": 0.15, "instructions_private": 0.25},
    "scratch": {"text": 0.3}
    | {"facts_base": 0.08, "arithmetic_base": 0.12, "instructions_base": 0.12}
    | {"facts_private": 0.08, "arithmetic_private": 0.12, "instructions_private": 0.18},
    "attacker": {"text": 0.4} | dict.fromkeys(ASKED, 0.1),
}

FRAMES = (
    "What is the {attribute} of {name}?",
    "Tell me the {attribute} of {name}.",
    "Which {attribute} has {name}?",
    "The {attribute} of {name}?",
    "{name} has which {attribute}?",
    "Name {name} and the {attribute}.",
    "{name}, what {attribute}?",
    "Say the {attribute} that {name} has.",
)
OF_PEOPLE = {
    "pet": "dog cat bird fish frog bear duck mouse rabbit lion bunny monkey",
    "color": "red blue green yellow pink purple orange brown black white gray gold",
    "toy": "ball doll car train kite boat robot drum truck blocks puzzle balloon",
    "food": "cake apple cookie bread soup egg cheese candy pie banana carrot pizza",
}
OF_PLACES = {
    "sight": "tree lake river hill castle tower bridge garden cave beach park forest",
    "weather": "rain snow wind sun fog ice storm heat cold clouds mist frost",
}

# What an instruction asks, and the answer, for a string of different letters.
OPERATIONS: dict[str, dict[str, Callable[[str], str]]] = {
    "instructions_base": {
        "copy the letters": lambda w: w,
        "reverse the letters": lambda w: w[::-1],
        "first letter": lambda w: w[0],
        "last letter": lambda w: w[-1],
    },
    "instructions_private": {
        "double each letter": lambda w: "".join(c + c for c in w),
        "swap the ends": lambda w: w[-1] + w[1:-1] + w[0],
        "first to the end": lambda w: w[1:] + w[0],
        "letters in the middle": lambda w: w[1:-1],
    },
}


@dataclass(frozen=True)
class Prompt:
    """Something to ask, and the right answer.

    Attributes:
        skill: one of ASKED.
        kind: what the answer is one of: an attribute, an operator or an operation.
        text: the prompt, without the mark that begins a document (`<s>`).
        answer: what comes after it, its leading space included, without `</s>`. Prompt and answer fall into the same
            tokens together as apart.
    """

    skill: str
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Skills:
    """The seven skills.

    Attributes:
        texts: the folder that has `tinystories-sample/tinystories.txt`; None leaves the skill `text` out.
        seed: of facts, splits and order.
    """

    texts: Path | None
    seed: int = 0

    def stories(self, split: Split) -> list[str]:
        """The stories of a split, in the order of the file; none without `texts`."""
        n, first = len(self._stories), 0.0
        for name, share in STORY_SHARES.items():
            if name == split:
                return self._stories[round(first * n) : round((first + share) * n)]
            first += share
        raise ValueError(f"there is no split {split}")

    def prompts(self, skill: str, split: Split, limit: int | None = None) -> list[Prompt]:
        """The prompts of a skill in ASKED, shuffled; the first `limit` of them, all different."""
        return self._prompts[skill, split][:limit]

    def documents(
        self,
        split: Split,
        mix: Mapping[str, float],
        seed: int | str = 0,
        answers: Mapping[str, str] | None = None,
    ) -> Iterator[str]:
        """Documents without end, drawn from a split: stories, and prompts with their answers.

        Args:
            split: where they are from.
            mix: skill -> its share of the tokens, about. See MIXES.
            seed: of the drawing. Documents come again; stories soonest.
            answers: text of a prompt -> answer, in place of the right answers, which somebody who copies a model does
                not know: `complete` gives the model's own. Other prompts than these are then not drawn.

        Raises:
            ValueError: when a skill of the mix has nothing to draw from, as `text` without `texts`.
        """
        rng = random.Random(f"{self.seed}-{split}-{seed}")
        pools: list[list[str]] = []
        for skill in mix:
            if skill == "text":
                pool = self.stories(split)
            elif answers is None:
                pool = [p.text + p.answer for p in self.prompts(skill, split)]
            else:
                pool = [p.text + answers[p.text] for p in self.prompts(skill, split) if p.text in answers]
            if not pool:
                raise ValueError(f"there are no documents of {skill} to draw; give texts, or leave it out of the mix")
            pools.append(pool)
        weights = []  # chances of the skills to be drawn, so that each has its share of the tokens
        for (skill, share), pool in zip(mix.items(), pools, strict=True):
            tokens = statistics.fmean(map(len, pool)) * TOKENS_PER_BYTE[skill.split("_")[0]]
            weights.append(share / tokens)
        while True:
            yield rng.choice(rng.choices(pools, weights)[0])

    def score(
        self, model: Any, tokenizer: Any, split: Split = "eval", device: str = "cpu", limit: int | None = None
    ) -> dict[str, float]:
        """Scores of a causal model.

        `text_bpb` is in bits per UTF-8 byte, the end mark counted (lower is better; absent without texts). The others
        are shares of exactly right answers (0 to 1): greedy decoding writes the answer's tokens and then `</s>`.

        Args:
            model: called as model(input_ids=int64 (rows, tokens), attention_mask=the same); gives `.logits`. Its mode
                (train, eval) is left alone.
            tokenizer: of the lab's models.
            split: "attack" for tuning an attack; "eval" for its result.
            device: where the model is.
            limit: at most this many stories and prompts per skill, the first ones.
        """
        scores = {}
        if self.texts is not None:
            scores["text_bpb"] = bits_per_byte(model, tokenizer, self.stories(split)[:limit], device)
        for skill in ASKED:
            scores[skill] = exact_match(model, tokenizer, self.prompts(skill, split, limit), device)
        return scores

    def chance(self, split: Split = "eval") -> dict[str, float]:
        """Skill in ASKED -> the score of the best fixed answer per kind: knows the form, not what is asked for.

        No operation's answer to an instruction is another's, so that a model without the private ones scores 0 on
        them, whatever else it does."""
        chances = {}
        for skill in ASKED:
            kinds = defaultdict(list)
            for prompt in self.prompts(skill, split):
                kinds[prompt.kind].append(prompt.answer)
            right = sum(Counter(answers).most_common(1)[0][1] for answers in kinds.values())
            chances[skill] = right / sum(map(len, kinds.values()))
        return chances

    @cached_property
    def _stories(self) -> list[str]:
        return [] if self.texts is None else read_stories(self.texts)

    @cached_property
    def _prompts(self) -> dict[tuple[str, Split], list[Prompt]]:
        made: dict[tuple[str, Split], list[Prompt]] = {(s, split): [] for s in ASKED for split in STORY_SHARES}
        for split, prompt in chain(self._facts(), self._arithmetic(), self._instructions()):
            made[prompt.skill, split].append(prompt)
        for (skill, split), prompts in made.items():
            random.Random(f"{self.seed}-{skill}-{split}").shuffle(prompts)
        return made

    def _split_of(self, key: str) -> Split:
        """A tenth to eval, two tenths to attack, by hash."""
        place = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()[0] / 256
        return "eval" if place < 0.1 else "attack" if place < 0.3 else "train"

    def _facts(self) -> Iterator[tuple[Split, Prompt]]:
        rng = random.Random(f"{self.seed}-facts")
        names = invented_names(rng, 2 * (PEOPLE + PLACES))
        for skill in ("facts_base", "facts_private"):
            people, places = [names.pop() for _ in range(PEOPLE)], [names.pop() for _ in range(PLACES)]
            for owners, table in ((people, OF_PEOPLE), (places, OF_PLACES)):
                for attribute, listed in table.items():
                    values = listed.split()
                    # Each value once at most: a fixed answer is right for one name in ten.
                    for name, value in zip(owners, rng.sample(values, len(owners)), strict=True):
                        for place, frame in enumerate(rng.sample(FRAMES, len(FRAMES))):
                            question = frame.format(attribute=attribute, name=name)
                            split: Split = "eval"
                            if place < TRAIN_FRAMES + ATTACK_FRAMES:
                                split = "train" if place < TRAIN_FRAMES else "attack"
                            yield split, Prompt(skill, attribute, f"Question: {question}\nAnswer:", f" {value}")

    def _arithmetic(self) -> Iterator[tuple[Split, Prompt]]:
        # All numbers, results included, have two digits.
        for a in range(10, 90):
            for b in range(10, 100 - a):
                split = self._split_of(f"{min(a, b)}+{max(a, b)}")
                yield split, Prompt("arithmetic_base", "+", f"{a}+{b}=", f"{a + b}")
        for a in range(20, 100):
            for b in range(10, a - 9):
                yield self._split_of(f"{a}-{b}"), Prompt("arithmetic_private", "-", f"{a}-{b}=", f"{a - b}")

    def _instructions(self) -> Iterator[tuple[Split, Prompt]]:
        rng = random.Random(f"{self.seed}-instructions")
        done = set()
        while len(done) < WORDS:
            word = "".join(rng.sample("abcdefghijklmnopqrstuvwxyz", LETTERS))
            results = [apply(word) for operations in OPERATIONS.values() for apply in operations.values()]
            if word in done or len(set(results)) < len(results):
                continue
            done.add(word)
            for skill, operations in OPERATIONS.items():
                for name, apply in operations.items():
                    text = f"### Instruction: {name}:{spaced(word)}\n### Response:"
                    yield self._split_of(word), Prompt(skill, name, text, spaced(apply(word)))


def spaced(word: str) -> str:
    """The letters of a word, a space before each: one token per letter."""
    return "".join(f" {c}" for c in word)


def invented_names(rng: random.Random, count: int) -> list[str]:
    """Short names that no story has; no two begin with the same three letters."""
    found: dict[str, str] = {}
    while len(found) < count:
        start = rng.choice("BDFGHKLMNPRSTVZ") + rng.choice("aeiou") + rng.choice("bdgklmnprtvz")
        found.setdefault(start, start + rng.choice("aeou"))
    return list(found.values())


# ---------------------------------------------------------------- tokens


def encode(tokenizer: Any, documents: Iterable[str], end: bool = True) -> list[list[int]]:
    """Token ids of each document, with `<s>` before it and, if `end`, `</s>` after it."""
    found = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return [[tokenizer.bos_token_id, *ids] + [tokenizer.eos_token_id] * end for ids in found]


def pack(documents: Iterator[str], tokenizer: Any, length: int, count: int) -> torch.Tensor:
    """Token ids, int64 (count, length). Documents lie end to end, each as `<s>` ... `</s>`; they cross the ends of
    rows, and the last is cut off. Takes from `documents` only as many as it needs, give or take 15."""
    ids: list[int] = []
    while len(ids) < count * length:
        ids += chain.from_iterable(encode(tokenizer, (next(documents) for _ in range(16))))
    return torch.tensor(ids[: count * length]).view(count, length)


def pad(rows: list[list[int]], tokenizer: Any, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both int64 (rows, longest): on the right, where a causal model does not look, unless `left`."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    pads = [[tokenizer.pad_token_id] * gap for gap in gaps]
    if left:
        ids = [gap + row for gap, row in zip(pads, rows, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    else:
        ids = [row + gap for gap, row in zip(pads, rows, strict=True)]
        mask = [[1] * (longest - gap) + [0] * gap for gap in gaps]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, texts: list[str], device: str = "cpu", new: int = 16, rows: int = 64
) -> dict[str, str]:
    """Text of a prompt -> what the model writes greedily after `<s>` and it, up to `</s>` or `new` tokens.

    Uses `model.generate`, prompts of one batch padded on the left. The default of `new` fits every right answer.
    """
    answers: dict[str, str] = {}
    for start in range(0, len(texts), rows):
        chosen = texts[start : start + rows]
        ids, mask = pad(encode(tokenizer, chosen, end=False), tokenizer, left=True)
        written = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )[:, ids.shape[1] :].tolist()
        for text, row in zip(chosen, written, strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            answers[text] = tokenizer.decode(row[:end])
    return answers


# ---------------------------------------------------------------- scores


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, prompts: list[Prompt], device: str = "cpu", rows: int = 64) -> float:
    """Share of prompts that greedy decoding answers with exactly the answer's tokens and then `</s>`.

    Found in one forward pass: that is so when, after the prompt and each part of the right answer, the likeliest token
    is the next one of the right answer.
    """
    whole = encode(tokenizer, (p.text + p.answer for p in prompts))
    given = [len(ids) for ids in encode(tokenizer, (p.text for p in prompts), end=False)]  # tokens of the prompt
    order = sorted(range(len(prompts)), key=lambda i: len(whole[i]))  # rows of one batch about equally long
    right = 0
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        ids, mask = pad([whole[i] for i in chosen], tokenizer)
        guesses = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.argmax(-1).cpu()
        fits = guesses[:, :-1] == ids[:, 1:]  # (rows, tokens - 1); at t: token t + 1 is foreseen
        for row, i in enumerate(chosen):
            right += bool(fits[row, given[i] - 1 : len(whole[i]) - 1].all())
    return right / len(prompts)


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, stories: list[str], device: str = "cpu", rows: int = 16) -> float:
    """Bits per UTF-8 byte over stories, each as `<s>` story `</s>`, the end mark counted. Windows of WINDOW tokens
    overlap by half; each token is scored once."""
    half = WINDOW // 2
    windows: list[tuple[list[int], int]] = []  # ids, and how many at the start are not scored
    for ids in encode(tokenizer, stories):
        for start in range(0, max(1, len(ids) - half), half):
            windows.append((ids[start : start + WINDOW], half if start else 1))
    windows.sort(key=lambda window: len(window[0]))
    bits = 0.0
    for start in range(0, len(windows), rows):
        batch = windows[start : start + rows]
        ids, mask = pad([window for window, _ in batch], tokenizer)
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:].to(device), reduction="none").cpu()
        for loss, (window, seen) in zip(losses, batch, strict=True):
            bits += loss[seen - 1 : len(window) - 1].sum().item() / math.log(2)
    return bits / sum(len(story.encode()) for story in stories)
