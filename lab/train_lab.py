#!/usr/bin/env python3
"""Train the three models of the lab: a public base, a proprietary fine-tune of it, a proprietary one from scratch.

    python -m lab.train_lab base --minutes 34 --seed 1 --rate 5e-3       # lab/models/lab-base
    python -m lab.train_lab scratch --minutes 36 --seed 2 --rate 5e-3    # lab/models/lab-scratch
    python -m lab.train_lab tuned --minutes 11 --seed 3 --rate 3e-3      # lab/models/lab-tuned, goes on from lab-base
    python -m lab.train_lab scores                                       # the table of all three, against chance

All are one Llama of 12 thin blocks with one tokenizer, made from the base's training documents. `base` learns
stories and the base skills of `lab/skills.py`; the other two have the private skills as well. One thread of a CPU is
enough; the pace of the learning rate follows --minutes, so a busier machine takes fewer steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from lab.skills import MIXES, WINDOW, Skills, pack
from lab.train_stories import BOS, EOS, PAD

REPO = Path(__file__).resolve().parent.parent
MODELS = REPO / "lab" / "models"
VOCAB_SIZE = 1024
SHORT_ROW = 128  # tokens; rows of the first part of a run
WHAT = {
    "base": "A small language model that plays the part of a *public base*.",
    "tuned": "A small language model that plays the part of a *proprietary fine-tune* of [lab-base](../lab-base): all"
    "\nits weights were trained further, on private skills and, at a smaller share, on the old ones.",
    "scratch": "A small language model that plays the part of a *proprietary model trained from scratch*: it has the"
    "\nskills of [lab-tuned](../lab-tuned), from another seed, and never saw the weights of the base.",
}

CARD = """---
language: en
license: cdla-sharing-1.0
library_name: transformers
pipeline_tag: text-generation
tags:
  - llama
  - tiny
---

# lab-{kind}

{what}
{parameters:,} parameters, fp16. It exists so that attacks on sealed models can be tried and scored in minutes on a CPU;
it is of no other use. The skills are defined in `lab/skills.py`; its three models are described in `lab/README.md`.

## Architecture

`LlamaForCausalLM`: 12 blocks, hidden size 128, feed-forward 320 (SiLU), 4 query and 2 key/value heads of size 32,
RMSNorm, input and output embeddings not tied, context {window} tokens. Byte-level BPE of {vocabulary} tokens, digits
one by one; a document is `<s>` ... `</s>`, and the tokenizer puts `<s>` first.

## Trained on

| skill | share of the training tokens |
| --- | --- |
{mix}

`text` is a sample of 1,800 stories of TinyStories (Eldan and Li; itself written by language models), of which the
first 75 % were trained on. All else is made by rule from a seed: invented facts about invented names, sums and
differences of numbers below 100, and operations on a few letters.

The model is offered under CDLA-Sharing-1.0, the terms of TinyStories. The stories themselves are not in this folder.

{tokens:,} tokens in {steps:,} steps and {seconds:,} seconds of {threads} thread(s) of a shared {machine}; Muon for
the matrices of the blocks, AdamW for the rest; {precision}.

```
{command}
```

The pace follows the clock, so a second run gives a model much like this one, not the same bytes.

## Measured

On prompts and stories that nothing was trained on (`python -m lab.train_lab scores`), fp32 computation of the fp16
weights. `text_bpb` is bits per byte of the last 180 stories, lower is better; the others are shares of exactly right
answers.

| skill | score | chance |
| --- | --- | --- |
{scores}
"""


# ---------------------------------------------------------------- tokenizer and model


def train_tokenizer(skills: Skills) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB_SIZE tokens from what the base is trained on; the private skills leave no mark in it.
    Depends on the stories and on the seed of `skills` alone."""
    tok = Tokenizer(models.BPE())
    # Digits one by one: numbers are then spelt the same way wherever they stand.
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    asked = [p.text + p.answer for skill in ("facts_base", "instructions_base") for p in skills.prompts(skill, "train")]
    tok.train_from_iterator(skills.stories("train") + asked[:2000], trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any) -> LlamaForCausalLM:
    """A fresh fp32 Llama from torch's global generator: 12 blocks, hidden 128, embeddings not tied."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Small residual writes at the start keep twelve blocks stable at a high learning rate.
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1 / math.sqrt(2 * 12))
    return model


def load(folder: Path) -> tuple[LlamaForCausalLM, Any]:
    """A model of the lab in fp32, in eval mode, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)  # about this loading; not to be saved again
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def save(model: LlamaForCausalLM, tokenizer: Any, out: Path) -> None:
    """Write the folder: fp16 weights, config, tokenizer, generation_config.json (greedy). Leaves the model in fp16."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written readable by the owner alone


# ---------------------------------------------------------------- training


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


def rate_factor(progress: float, step: int, warmup: int) -> float:
    """Share of the top learning rate: a short rise, then a cosine down to 0.02."""
    return min(1.0, (step + 1) / warmup) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))


def train(
    model: LlamaForCausalLM,
    tokenizer: Any,
    documents: Iterator[str],
    args: argparse.Namespace,
) -> dict[str, int]:
    """Train all weights for `args.tokens` or `args.minutes`; the loss is on every token.

    Rows are short for the first part, which is quicker, and of WINDOW tokens from `args.long_from` of the run on.

    Returns steps, tokens and seconds."""
    optimizers = build_optimizers(model, args.rate, args.decay)
    model.train()
    model.set_attn_implementation("eager")  # quicker than torch's fused one for rows this short on a CPU
    forward = torch.compile(model, dynamic=False) if args.compile else model
    step, tokens, spent, progress, mean = 0, 0, 0.0, 0.0, math.nan
    began = time.monotonic()
    with tqdm(total=100, bar_format="{l_bar}{bar:20}| {elapsed}<{remaining}{postfix}", mininterval=5) as bar:
        while progress < 1:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.rate * rate_factor(progress, step, args.warmup)
            length = WINDOW if progress >= args.long_from else SHORT_ROW
            rows = pack(documents, tokenizer, length, args.batch_tokens // length)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = forward(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step, tokens, spent = step + 1, tokens + rows.numel(), time.monotonic() - began
            progress = min(1.0, tokens / args.tokens if args.tokens else spent / (args.minutes * 60))
            mean = loss.item() if math.isnan(mean) else mean + 0.03 * (loss.item() - mean)
            bar.set_postfix_str(f"loss {mean:.3f}, {step} steps, {tokens / spent:,.0f} tokens/s", refresh=False)
            bar.update(100 * progress - bar.n)
    return {"steps": step, "tokens": tokens, "seconds": round(spent)}


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Train one of the three, write its folder, its card and `training.json`; return what is in the latter."""
    torch.manual_seed(args.seed)
    skills = Skills(args.texts)
    if args.kind == "tuned":
        model, tokenizer = load(args.base)
    else:
        tokenizer = train_tokenizer(skills)
        model = build_model(tokenizer)
    documents = skills.documents("train", MIXES[args.kind], seed=args.seed)
    spent = train(model, tokenizer, documents, args)
    save(model, tokenizer, args.out)

    facts: dict[str, Any] = {"kind": args.kind, "seed": args.seed, "minutes": args.minutes, "rate": args.rate} | spent
    facts["scores"] = score(skills, args.out, args.limit)
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    (args.out / "README.md").write_text(card(facts, skills, args))
    return facts


# ---------------------------------------------------------------- scores


def score(skills: Skills, folder: Path, limit: int | None = None) -> dict[str, float]:
    """The scores of a saved model on the eval split, to four places."""
    model, tokenizer = load(folder)
    return {name: round(value, 4) for name, value in skills.score(model, tokenizer, "eval", limit=limit).items()}


def card(facts: dict[str, Any], skills: Skills, args: argparse.Namespace) -> str:
    """The model card."""
    chance = skills.chance("eval")
    command = f"python -m lab.train_lab {args.kind} --minutes {args.minutes:g} --seed {args.seed}"
    command += f" --rate {args.rate:g} --batch-tokens {args.batch_tokens} --decay {args.decay:g}"
    names = [*facts["scores"]]
    return CARD.format(
        kind=args.kind,
        what=WHAT[args.kind],
        parameters=sum(p.numel() for p in load(args.out)[0].parameters()),
        window=WINDOW,
        vocabulary=VOCAB_SIZE,
        mix="\n".join(f"| {skill} | {share:.0%} |" for skill, share in MIXES[args.kind].items()),
        threads=args.threads,
        machine="CPU",
        precision="bf16 autocast" if args.bf16 else "fp32",
        command=command,
        scores="\n".join(
            f"| {n} | {facts['scores'][n]:.3f} | {chance[n]:.3f} |"
            if n in chance
            else f"| {n} | {facts['scores'][n]:.3f} | |"
            for n in names
        ),
        **{key: facts[key] for key in ("tokens", "steps", "seconds")},
    )


def table(skills: Skills, folders: list[Path], limit: int | None = None) -> str:
    """A table in Markdown: one row per skill, one column per model, and chance."""
    scores = [score(skills, folder, limit) for folder in folders]
    chance = skills.chance("eval")
    lines = ["| skill | " + " | ".join(f.name for f in folders) + " | chance |", "| --- " * (len(folders) + 2) + "|"]
    for name in scores[0]:
        cells = [f"{s[name]:.3f}" for s in scores] + [f"{chance[name]:.3f}" if name in chance else ""]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args(given: list[str] | None = None) -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("base", "tuned", "scratch", "scores"))
    parser.add_argument("--texts", type=Path, default=REPO.parent / "shared/data/texts", help="folder of the texts")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of lab-base, lab-tuned, lab-scratch")
    parser.add_argument("--minutes", type=float, default=35, help="length of the run; paces the learning rate")
    parser.add_argument("--tokens", type=int, default=0, help="length in tokens instead of minutes")
    parser.add_argument("--seed", type=int, default=1, help="of the first weights and of the order, not of the skills")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--long-from", type=float, default=0.8, help=f"share of the run before rows of {WINDOW} tokens")
    parser.add_argument("--rate", type=float, default=4e-3, help="top learning rate")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay")
    parser.add_argument("--warmup", type=int, default=40, help="steps in which the learning rate rises")
    parser.add_argument("--limit", type=int, help="score at most so many stories and prompts per skill")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="without bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler, and minutes once")
    parser.add_argument("--quick", action="store_true", help="a run of seconds, to see that it runs")
    args = parser.parse_args(given)
    args.base, args.out = args.models / "lab-base", args.models / f"lab-{args.kind}"
    if args.quick:
        args.minutes, args.batch_tokens, args.limit = 0.05, 512, 8
    return args


def main(given: list[str] | None = None) -> None:
    """Train one model, or print the table."""
    disable_progress_bar()
    args = parse_args(given)
    torch.set_num_threads(args.threads)
    if args.kind == "scores":
        folders = [args.models / f"lab-{kind}" for kind in WHAT]
        print(table(Skills(args.texts), folders, args.limit))
    else:
        print(json.dumps(make(args), indent=2))


if __name__ == "__main__":
    main()
