#!/usr/bin/env python3
"""Train `stories-4m`, the small Llama-style model that the demo and the tests of semiopen use.

    python lab/train_stories.py                     # one hour on two CPU cores
    python lab/train_stories.py --eval-only         # held-back bits per byte of the exported model

The texts are a sample of TinyStories (CDLA-Sharing-1.0) and, at a small weight, the training problems of
GSM8K (MIT). Part of the stories is turned into short chats ("Tell me a story about a dog." -> the story). The
run can be stopped and started again: it goes on from `state.pt` in --runs. The best weights so far are
exported at every check.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

REPO = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 2048
CONTEXT = 512  # tokens
SHORT_ROW = 256  # tokens; rows of the first part of the run, quicker per token than full rows
SPLIT_SEED = 1234  # never follows --seed: the held-back stories must stay the same for every run
TEST_SHARE, WATCH_SHARE = 0.05, 0.03  # of the stories: reported at the end / used to choose the checkpoint
PAD, BOS, EOS, SYSTEM, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] | trim + eos_token }}"
    "{% elif m['role'] == 'system' %}{{ '<|system|>' + m['content'] | trim }}"
    "{% else %}{{ '<|user|>' + m['content'] | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

GIRLS = [
    "Lily",
    "Lucy",
    "Mia",
    "Anna",
    "Sarah",
    "Sue",
    "Molly",
    "Jane",
    "Sara",
    "Daisy",
    "Jill",
    "Sally",
    "Mary",
    "Amy",
    "Lila",
    "Grace",
    "Jenny",
    "Emma",
    "Emily",
]
BOYS = [
    "Ben",
    "Tom",
    "Timmy",
    "Tim",
    "Jack",
    "Sam",
    "Max",
    "Bob",
    "John",
    "Joe",
    "Benny",
    "Tommy",
    "Jimmy",
    "Andy",
    "Jake",
    "Jim",
    "Billy",
    "Dave",
    "Leo",
    "Peter",
]
NOT_NAMES = {
    "Mom",
    "Mommy",
    "Dad",
    "Daddy",
    "Mum",
    "Mummy",
    "Mama",
    "Papa",
    "Grandma",
    "Grandpa",
    "Granny",
    "Mr",
    "Mrs",
    "Miss",
    "Little",
    "Man",
    "God",
    "Slowly",
    "End",
    "The",
    "I",
    "Once",
    "One",
    "He",
    "She",
    "They",
    "It",
    "But",
    "And",
    "So",
    "Then",
    "Yes",
    "No",
    "Thank",
    "Oh",
    "Wow",
    "Hi",
    "Hello",
    "Let",
    "We",
    "You",
    "What",
    "Can",
    "Do",
    "Please",
    "Why",
    "When",
}
# Words that may follow a noun but seldom follow an adjective: "the dog was", not "the big was".
AFTER_NOUN = {
    "was",
    "is",
    "and",
    "had",
    "in",
    "on",
    "to",
    "that",
    "with",
    "of",
    "for",
    "said",
    "from",
    "were",
    "could",
    "did",
    "would",
    "saw",
    "went",
    "came",
}

ASK_ABOUT = (
    "Tell me a story about {}.",
    "Tell me a story about {}",
    "tell me a story about {}",
    "Please tell me a story about {}.",
    "Tell me a short story about {}.",
    "Can you tell me a story about {}?",
    "Could you tell a story about {}, please?",
    "Write a story about {}.",
    "Write a short story about {}.",
    "I want to hear a story about {}.",
    "I would like a story about {}, please.",
    "Make up a story about {}.",
    "Tell me a bedtime story about {}.",
    "A story about {}, please.",
    "Do you know a story about {}?",
)
ASK_ANY = (
    "Tell me a story.",
    "Tell me a story",
    "Please tell me a story.",
    "Can you tell me a story?",
    "Write a short story.",
    "Tell me a bedtime story.",
    "I want to hear a story.",
)
ASK_CONTINUE = (
    "Continue this story: {}",
    "How does this story go on? {}",
    "Please go on with this story: {}",
)
ASK_AGAIN = ("Another one, please, about {}.", "Now tell me one about {}.", "Tell me another story about {}.")
ASK_WHO = ("Who is in the story?", "Who was in the story?", "What are the names in the story?")
ASK_END = ("How does the story end?", "How did it end?", "What happened at the end?")
SMALL_TALK = (
    ("Hello!", "Hello! Would you like to hear a story?"),
    ("Hi", "Hi! Would you like to hear a story?"),
    ("Hello, how are you?", "Hello! I am happy today. Would you like to hear a story?"),
    ("Who are you?", "I am a small story teller. I like to tell short stories."),
    ("What are you?", "I am a small language model. I like to tell short stories."),
    ("What can you do?", "I can tell short stories. Ask me for a story about a dog, a ball or a girl."),
    ("Can you help me?", "Yes! I can tell you a short story. What should it be about?"),
)
THANKS = (
    ("Thank you!", "You are welcome! I am glad you liked the story."),
    ("Thank you, that was nice.", "You are welcome! I am glad you liked the story."),
    ("Thanks!", "You are welcome! Would you like to hear another story?"),
    ("I like this story.", "I am glad! Would you like to hear another story?"),
    ("Good night!", "Good night! Sleep well."),
)
SYSTEM_TEXTS = (
    "You are a kind story teller.",
    "You are a helpful assistant.",
    "You tell short stories to children.",
)


# ---------------------------------------------------------------- texts


def plain_quotes(text: str) -> str:
    """Text with curly quotes, dashes and dots replaced by ASCII; a small vocabulary has no room for both."""
    pairs = {"“": '"', "”": '"', "’": "'", "‘": "'", "–": "-", "—": "-", "…": "..."}
    return text.translate(str.maketrans(pairs))


def read_stories(texts: Path) -> list[str]:
    """Stories of the TinyStories sample under `texts`, without doubles, in file order."""
    raw = (texts / "tinystories-sample" / "tinystories.txt").read_text(encoding="utf-8")
    stories = (plain_quotes(s).strip() for s in raw.split("<|endoftext|>"))
    return list(dict.fromkeys(s for s in stories if s))


def split_stories(stories: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(train, watch, test): a fixed shuffle, then the last stories are kept back. Same for every run."""
    order = stories[:]
    random.Random(SPLIT_SEED).shuffle(order)
    n_test, n_watch = round(len(order) * TEST_SHARE), round(len(order) * WATCH_SHARE)
    return order[: -n_test - n_watch], order[-n_test - n_watch : -n_test], order[-n_test:]


def read_problems(texts: Path) -> list[tuple[str, str]]:
    """GSM8K training problems as (question, answer), calculator notes removed, the result as a sentence."""
    problems = []
    for line in (texts / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        answer = re.sub(r"<<[^>]*>>", "", record["answer"])
        answer = re.sub(r"\n#### (.*)", r"\nThe answer is \1.", answer)
        problems.append((plain_quotes(record["question"]).strip(), plain_quotes(answer).strip()))
    return problems


def find_nouns(stories: list[str], least: int = 6) -> set[str]:
    """Lower-case words that look like nouns: after an article mostly a verb or a full stop follows."""
    seen: Counter[str] = Counter()
    as_noun: Counter[str] = Counter()
    for story in stories:
        for word, after in re.findall(r"\b(?:a|the|his|her) ([a-z]{3,})(?=([.,!?]| [a-z]+))", story):
            seen[word] += 1
            as_noun[word] += after in ".,!?" or after.strip() in AFTER_NOUN
    drop = {
        "other",
        "same",
        "next",
        "best",
        "one",
        "two",
        "end",
        "day",
        "time",
        "first",
        "last",
        "way",
        "rest",
        "lot",
        "bit",
        "girl",
        "boy",
    }
    drop |= {"not", "how", "back", "again", "help"}
    return {w for w, n in seen.items() if n >= least and as_noun[w] / n > 0.6 and w not in drop}


def find_names(story: str) -> list[str]:
    """Names in a story, most frequent first: words with a capital in mid-sentence, at least twice."""
    found = Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+\b", story))
    return [w for w, n in found.most_common() if n >= 2 and w not in NOT_NAMES]


def swap_names(story: str, rng: random.Random) -> str:
    """Story with common first names exchanged for others: fights learning the sample by heart."""
    present = set(re.findall(r"\b[A-Z][a-z]+\b", story))
    mapping: dict[str, str] = {}
    for pool in (GIRLS, BOYS):
        fresh = [n for n in pool if n not in present]
        rng.shuffle(fresh)
        mapping |= dict(zip([n for n in pool if n in present], fresh, strict=False))
    if not mapping:
        return story
    return re.sub(r"\b(" + "|".join(mapping) + r")\b", lambda m: mapping[m.group()], story)


# ---------------------------------------------------------------- training documents


def render_chat(messages: list[tuple[str, str]]) -> str:
    """The text that CHAT_TEMPLATE makes of [(role, content), ...]; faster than the template engine."""
    out = BOS
    for role, content in messages:
        mark = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}[role]
        out += mark + content.strip() + (EOS if role == "assistant" else "")
    return out


def subject_of(story: str, nouns: set[str], rng: random.Random) -> str | None:
    """Something the story is about: a name or noun used at least twice in it; else None."""
    words = Counter(re.findall(r"[a-z]+", story))
    picks = [w for w, n in words.items() if n >= 2 and w in nouns]
    things = [w if w.endswith("s") else rng.choice((f"a {w}", f"a {w}", f"the {w}")) for w in picks]
    things = [re.sub(r"^a (?=[aeiou])", "an ", t) for t in things]
    names = find_names(story)[:2]
    pool = rng.choice([p for p in (things, names) if p] or [[]])
    if not pool:
        return None
    if len(pool) > 1 and rng.random() < 0.15:
        return " and ".join(rng.sample(pool, 2))
    return rng.choice(pool)


def sentences(story: str) -> list[str]:
    """Sentences of a story, quotes kept with the sentence they close."""
    return [s for s in re.split(r"(?<=[.!?\"])\s+(?=[A-Z\"])", story) if s]


def story_chat(stories: list[str], nouns: set[str], rng: random.Random) -> str:
    """A chat in which a story is asked for and told, sometimes with small talk before and questions after."""
    story = swap_names(rng.choice(stories), rng)
    chat: list[tuple[str, str]] = []
    if rng.random() < 0.1:
        chat.append(("system", rng.choice(SYSTEM_TEXTS)))
    if rng.random() < 0.12:
        ask, answer = rng.choice(SMALL_TALK)
        chat += [("user", ask), ("assistant", answer)]
        if rng.random() < 0.3:
            return render_chat(chat)
    subject = subject_of(story, nouns, rng)
    if rng.random() < 0.12:
        start, *rest = sentences(story)
        if rest:
            chat += [("user", rng.choice(ASK_CONTINUE).format(start)), ("assistant", " ".join(rest))]
            return render_chat(chat)
    ask = rng.choice(ASK_ABOUT).format(subject) if subject and rng.random() < 0.85 else rng.choice(ASK_ANY)
    chat += [("user", ask), ("assistant", story)]
    dice = rng.random()
    if dice < 0.15:
        chat += list(zip(("user", "assistant"), rng.choice(THANKS), strict=True))
    elif dice < 0.27 and (names := find_names(story)[:3]):
        who = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        chat += [("user", rng.choice(ASK_WHO)), ("assistant", f"The story is about {who}.")]
    elif dice < 0.34:
        chat += [("user", rng.choice(ASK_END)), ("assistant", sentences(story)[-1])]
    elif dice < 0.46:
        other = swap_names(rng.choice(stories), rng)
        if subject := subject_of(other, nouns, rng):
            chat += [("user", rng.choice(ASK_AGAIN).format(subject)), ("assistant", other)]
    return render_chat(chat)


def draw_document(stories: list[str], problems: list[tuple[str, str]], nouns: set[str], rng: random.Random) -> str:
    """One training document, marks included: a plain story, a story in a chat, or a problem."""
    dice = rng.random()
    if dice < 0.47:
        return BOS + swap_names(rng.choice(stories), rng) + EOS
    if dice < 0.90:
        return story_chat(stories, nouns, rng)
    question, answer = rng.choice(problems)
    if dice < 0.95:
        return render_chat([("user", question), ("assistant", answer)])
    return f"{BOS}{question}\n{answer}{EOS}"


def draw_rows(
    tokenizer: PreTrainedTokenizerFast, data: tuple, rng: random.Random, rows: int, length: int, aligned: bool
) -> torch.Tensor:
    """Token ids (rows, length). Documents lie end to end; `aligned`: rows start with a fresh one."""
    ids: list[int] = []
    while len(ids) < rows * length:
        texts = [draw_document(*data, rng) for _ in range(16)]
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
            ids += encoding.ids
            if aligned and len(ids) % length < len(encoding.ids):
                # This document crossed a row border: cut there, so that the next row sees its own beginning.
                ids = ids[: len(ids) // length * length]
    return torch.tensor(ids[: rows * length]).view(rows, length)


# ---------------------------------------------------------------- tokenizer and model


def train_tokenizer(stories: list[str], problems: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB_SIZE tokens with <s>, </s>, <pad> and the chat marks, and the chat template."""
    tok = Tokenizer(models.BPE())
    # Digits one by one: numbers are then spelt the same way wherever they stand.
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    specials = [PAD, BOS, EOS, SYSTEM, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    asks = [a.format("a dog") for a in ASK_ABOUT + ASK_ANY + ASK_AGAIN] * 5
    # A tenth of the problems: the merges should serve the stories first.
    tok.train_from_iterator(stories + asks + [f"{q}\n{a}" for q, a in problems[::10]], trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    check_template(fast)
    return fast


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Stop when the chats trained on and the chats made by the template differ."""
    chat = [("system", " Be kind. "), ("user", "Hi"), ("assistant", "Hello!\nYes?"), ("user", "A story.")]
    messages = [{"role": role, "content": content} for role, content in chat]
    made = tokenizer.apply_chat_template(messages, tokenize=False)
    if made != render_chat(chat):
        raise ValueError(f"chat template and render_chat disagree: {made!r}")


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh fp32 Llama: 8 blocks, hidden 192, 6 query and 2 key/value heads, embeddings not tied."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for block in model.model.layers:
            # Small residual writes at the start keep eight blocks stable at the high learning rate used here.
            for proj in (block.self_attn.o_proj, block.mlp.down_proj):
                proj.weight.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Dropout on what each block writes back. Dropout of attention weights would halve the speed on a CPU."""

    def drop(module: nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, module.training)

    for block in model.model.layers:
        block.self_attn.o_proj.register_forward_hook(drop)
        block.mlp.down_proj.register_forward_hook(drop)


def build_optimizers(model: LlamaForCausalLM, rate: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    groups = [{"params": tables, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98)),
    ]


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> float:
    """Bits per UTF-8 byte over stories. Each is <s> story </s>, the end mark counted; windows of CONTEXT
    tokens that overlap by half, each token scored once; computed in the dtype of the model,
    summed in fp32."""
    bits, size = 0.0, 0
    for story in stories:
        encoding = tokenizer.backend_tokenizer.encode(BOS + story + EOS, add_special_tokens=False)
        ids = torch.tensor([encoding.ids])
        size += len(story.encode("utf-8"))
        done = 1  # tokens scored so far; <s> is given
        while done < ids.shape[1]:
            start = 0 if done == 1 else done - CONTEXT // 2
            window = ids[:, start : start + CONTEXT]
            logits = model(input_ids=window[:, :-1], use_cache=False).logits.float()
            loss = F.cross_entropy(logits[0], window[0, 1:], reduction="none")
            bits += loss[done - start - 1 :].sum().item() / math.log(2)
            done = start + window.shape[1]
    return bits / size


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, new: int = 200, **settings) -> str:
    """Text written after `prompt` (marks included), at most `new` tokens; greedy unless settings say more."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    settings = {"do_sample": False, "temperature": None, "top_p": None} | settings
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def load_export(out: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The exported model in fp32 and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(out)


def evaluate_export(out: Path, texts: Path) -> None:
    """Print size, held-back bits per byte and a few samples of the exported model."""
    model, tokenizer = load_export(out)
    train, watch, test = split_stories(read_stories(texts))
    print(f"parameters                {sum(p.numel() for p in model.parameters()):,}")
    print(f"weights file              {(out / 'model.safetensors').stat().st_size / 1e6:.2f} MB")
    for name, part in (
        ("test, held back", test),
        ("watch, held back", watch),
        ("train, first 90", train[:90]),
    ):
        print(f"{name:<18} {bits_per_byte(model, tokenizer, part):.4f} bits per byte ({len(part)} stories)")
    half = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16).eval()
    print(f"{'test, fp16 compute':<18} {bits_per_byte(half, tokenizer, test):.4f} bits per byte")
    show_samples(model, tokenizer)


def show_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print greedy and sampled answers to a few fixed prompts."""
    chat = [("user", "Hello!"), ("assistant", "Hello! Would you like to hear a story?")]
    prompts = [
        BOS + "Once upon a time",
        render_chat([("user", "Tell me a story about a dog.")]) + ASSISTANT,
        render_chat([*chat, ("user", "Yes, tell me a story about a red ball.")]) + ASSISTANT,
        render_chat([("user", "Who are you?")]) + ASSISTANT,
    ]
    for prompt in prompts:
        print(f"\n--- greedy: {prompt}\n{sample(model, tokenizer, prompt)}")
    torch.manual_seed(0)
    for prompt in prompts[:2]:
        text = sample(model, tokenizer, prompt, do_sample=True, temperature=0.7, top_p=0.9)
        print(f"\n--- temperature 0.7, top_p 0.9: {prompt}\n{text}")


# ---------------------------------------------------------------- training


def export(weights: dict, tokenizer: PreTrainedTokenizerFast, out: Path, facts: dict) -> None:
    """Write the model (fp16), the tokenizer, generation_config.json and training.json (the run's numbers)."""
    out.mkdir(parents=True, exist_ok=True)
    model = build_model(tokenizer)
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written readable by the owner alone
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def rate_factor(progress: float, step: int, warmup: int = 60, flat: float = 0.3) -> float:
    """Share of the top learning rate: a short rise, flat until `flat` of the run, then down to 0.02."""
    fall = max(0.02, 1 - max(0.0, progress - flat) / (1 - flat))
    return min(1.0, (step + 1) / warmup) * fall


def train(args: argparse.Namespace) -> None:
    """Train until --steps or --minutes, or until the watched bits per byte stop falling; export the best."""
    torch.manual_seed(args.seed)
    stories = read_stories(args.texts)
    train_part, watch, test = split_stories(stories)
    problems, nouns = read_problems(args.texts), find_nouns(train_part)
    data = (train_part, problems, nouns)
    args.runs.mkdir(parents=True, exist_ok=True)
    state_path = args.runs / "state.pt"
    state = torch.load(state_path, weights_only=False) if state_path.exists() and not args.fresh else None
    if state:
        tokenizer = AutoTokenizer.from_pretrained(args.runs / "tokenizer")
        for key in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(key, None)  # about this loading; not to be exported
    else:
        tokenizer = train_tokenizer(train_part, problems)
        tokenizer.save_pretrained(args.runs / "tokenizer")
    model = build_model(tokenizer)
    add_dropout(model, args.dropout)
    average = build_model(tokenizer).eval()  # running mean of the weights: what is measured and exported
    average.load_state_dict(model.state_dict())
    optimizers = build_optimizers(model, args.rate, args.decay)
    step, spent, tokens, best, stale = 0, 0.0, 0, math.inf, 0
    if state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay  # as asked for now, not as it was when the run began
        step, spent, tokens, best, stale = (state[k] for k in ("step", "spent", "tokens", "best", "stale"))
        print(f"goes on from step {step}, {spent / 60:.1f} minutes, best {best:.4f}")
    forward = torch.compile(model) if args.compile else model
    print(
        f"{len(train_part)} / {len(watch)} / {len(test)} stories to train / watch / test, "
        f"{len(problems)} problems, {len(nouns)} nouns, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{args.threads} threads, bf16 {args.bf16}, compile {args.compile}",
        flush=True,
    )

    last_clock, last_check, shown = time.monotonic(), spent, 0.0
    while True:
        progress = step / args.steps if args.steps else spent / (args.minutes * 60)
        ended = progress >= 1 or stale >= args.patience
        if (step and spent - last_check > args.check_minutes * 60) or ended:
            last_check = spent
            bpb = bits_per_byte(average, tokenizer, watch)
            stale = 0 if bpb < best - 1e-4 else stale + 1
            print(
                f"check: step {step}, {spent / 60:.1f} min, {tokens:,} tokens, watched {bpb:.4f} bits per byte",
                flush=True,
            )
            if bpb < best:
                best = bpb
                facts = {
                    "steps": step,
                    "tokens": tokens,
                    "minutes": round(spent / 60, 1),
                    "watched_bits_per_byte": round(bpb, 4),
                    "test_bits_per_byte": round(bits_per_byte(average, tokenizer, test), 4),
                    "seed": args.seed,
                }
                export(average.state_dict(), tokenizer, args.out, facts)
                opening = sample(average, tokenizer, BOS + "Once upon a time", 60)
                print(
                    f"exported, test {facts['test_bits_per_byte']:.4f} bits per byte: ...{opening!r}",
                    flush=True,
                )
            saved = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "step": step,
                "spent": spent,
            }
            saved |= {"tokens": tokens, "best": best, "stale": stale}
            saved["optimizers"] = [o.state_dict() for o in optimizers]
            torch.save(saved, state_path.with_suffix(".new"))
            state_path.with_suffix(".new").replace(state_path)  # never a half-written checkpoint
        if ended:
            break

        # The generator is seeded by the step, so that a resumed run sees what an unbroken one would.
        rng = random.Random(f"{args.seed}-{step}")
        long_rows = progress >= args.long_from
        length = CONTEXT if long_rows else SHORT_ROW
        rows = draw_rows(tokenizer, data, rng, args.batch_tokens // length, length, aligned=long_rows)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * rate_factor(progress, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = forward(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        keep = min(args.average, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - keep)
        step, tokens = step + 1, tokens + rows.numel()
        now = time.monotonic()
        spent, last_clock = spent + now - last_clock, now
        if spent - shown > 30:
            shown = spent
            print(
                f"step {step}  {spent / 60:5.1f} min  {progress:4.0%}  loss {loss.item():.3f}  "
                f"rate {args.rate * rate_factor(progress, step):.5f}  {tokens / spent:,.0f} tokens/s",
                flush=True,
            )
    print(f"done: best watched bits per byte {best:.4f}, exported to {args.out}")


def parse_args() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, default=REPO.parent / "shared/data/texts", help="folder of the texts")
    parser.add_argument("--out", type=Path, default=REPO / "lab/models/stories-4m", help="folder of the export")
    parser.add_argument("--runs", type=Path, default=REPO / "lab/runs/stories-4m", help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=60, help="length of the run; paces the learning rate")
    parser.add_argument("--steps", type=int, default=0, help="length in steps instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens per step")
    parser.add_argument("--rate", type=float, default=3e-3, help="top learning rate")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay")
    parser.add_argument("--dropout", type=float, default=0.2, help="on what the blocks write back")
    parser.add_argument("--average", type=float, default=0.99, help="decay of the running mean of the weights")
    parser.add_argument("--long-from", type=float, default=0.6, help="share of the run before rows are full")
    parser.add_argument("--check-minutes", type=float, default=3, help="time between checks on held-back stories")
    parser.add_argument("--patience", type=int, default=7, help="checks without a gain before the run stops")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    parser.add_argument("--fresh", action="store_true", help="start anew even if there is a checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="measure the exported model and stop")
    return parser.parse_args()


def main() -> None:
    """Entry point."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # denormals are slow, and worth nothing here
    disable_progress_bar()  # of loading and saving: noise between the lines of a run
    if args.eval_only:
        evaluate_export(args.out, args.texts)
    else:
        train(args)


if __name__ == "__main__":
    main()
