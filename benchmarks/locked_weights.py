#!/usr/bin/env python3
"""What a keyed fold and a sealed head hide: every weight attack on the lab's models, with its controls.

    python benchmarks/locked_weights.py --texts TEXTS                  # resumes from docs/results/locked_weights.jsonl
    python benchmarks/locked_weights.py --texts TEXTS --only align --keys 1
    python benchmarks/locked_weights.py --tables

Plans:

- permuted: one permutation of the stream, norm gains kept, as DistilLock has it; nothing else is changed.
- distillock: the embedding sealed, keyed, the vocabulary of the head shuffled.
- recommended: the embedding and two blocks sealed, keyed, the head sealed.
- plain-0, plain-2, keyed-0, keyed-2: the head open; with -sealed, sealed.

Each finished attack is a line in --out: what the auditor, who has the secret, finds right in it, and how the model that
the thief puts together does on texts that no attack has seen. `control` is "win" where an attack must succeed, "lose"
where it must not. Delete the file to begin anew.

Victims are played by models in the clear; tests/audit/test_weights.py shows that a real bundle gives out the same.
"""

import argparse
import hashlib
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import REPO, machine, print_machine, progress, read_lines, write_line
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

sys.path.insert(0, str(REPO))
from lab.skills import ASKED, MIXES, PRIVATE, Skills, complete, exact_match, pack
from semiopen.audit.attacks import sem
from semiopen.audit.score import Exam, score
from semiopen.audit.texts import sample_texts
from semiopen.audit.training import Settings
from semiopen.audit.victim import PlainVictim, SealedSet
from semiopen.audit.weights import (
    align,
    arrow_match,
    boundary,
    gain_sort,
    harvest,
    head_from_tokens,
    known_row,
    known_states,
    logit_svd,
    multi_view,
    no_enclave,
    vocabulary_frequency,
)
from semiopen.audit.weights.controls import permuted
from semiopen.audit.weights.finding import Finding, assemble
from semiopen.audit.weights.key import Key, exact_key, figures
from semiopen.audit.weights.layout import EMBEDDING, HEAD, NORM, fold_gains
from semiopen.audit.weights.sealed_head import SealedHead, final_states
from semiopen.model.split import causal_lm_class
from semiopen.model.symmetries import fold_tensors

LAB = REPO / "lab" / "models"
LENGTH = 128  # tokens of a query
EXAM = 32  # sequences
SEM = Settings(steps=400, batch=8, rates=(1e-3, 3e-3, 1e-2))
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """What is sealed, and how the rest is locked."""

    prefix: int
    lock: str  # none, permuted, keyed
    head: str  # open, shuffled, sealed


PLANS = {
    "permuted": Plan(0, "permuted", "open"),
    "distillock": Plan(0, "keyed", "shuffled"),
    "recommended": Plan(2, "keyed", "sealed"),
    **{
        f"{lock}-{prefix}{end}": Plan(prefix, "none" if lock == "plain" else lock, end.removeprefix("-") or "open")
        for lock in ("plain", "keyed")
        for prefix in (0, 2)
        for end in ("", "-sealed")
    },
}
TUNED, SCRATCH, BASE, SELF = "lab-tuned", "lab-scratch", "lab-base", "self"


@dataclass(frozen=True)
class Cell:
    """One attack on one victim.

    Attributes:
        attack: its name, and a number of tokens or another setting behind it.
        relative: the public model that the thief has; "self" is the victim in the clear.
        control: "win", "lose" or "".
    """

    attack: str
    plan: str
    model: str
    relative: str = ""
    control: str = ""
    seed: int = 0

    @property
    def key(self) -> str:
        """What names it in --out."""
        return json.dumps([self.attack, self.plan, self.model, self.relative, self.seed])


def cells(keys: int) -> Iterator[Cell]:
    """All of them, the first key first."""
    for seed in range(keys):
        for cell in _cells():
            if seed == 0 or not cell.attack.startswith("vocabulary_frequency"):  # the slowest, and no key is in it
                yield replace(cell, seed=seed)


def _cells() -> Iterator[Cell]:
    for relative in (BASE, SCRATCH):
        yield Cell("relative alone", "recommended", TUNED, relative)
    for attack in ("gain_sort", "arrow_match"):
        yield Cell(attack, "permuted", TUNED, BASE, "win")
        yield Cell(attack, "permuted", TUNED, SCRATCH, "lose")
        yield Cell(attack, "distillock", TUNED, BASE)
    yield Cell("arrow_match aligned", "distillock", TUNED, BASE)
    for plan in ("permuted", "distillock", "recommended"):
        yield Cell("align", plan, TUNED, BASE)
        yield Cell("align", plan, TUNED, SELF, "win")
    yield Cell("align", "recommended", TUNED, SCRATCH, "lose")
    yield Cell("align", "recommended", SCRATCH, BASE, "lose")
    for rows, name in itertools.product((1, 4), (TUNED, SCRATCH)):
        yield Cell(f"known_row {rows}", "permuted", name, "", "win")
    yield Cell("known_row 4", "distillock", TUNED)
    for tokens in (128, 512, 2048, 8192):
        for plan in ("distillock", "recommended"):
            yield Cell(f"known_states {tokens}", plan, TUNED, BASE)
    yield Cell("known_states 2048", "recommended", TUNED, SELF, "win")
    yield Cell("known_states 2048", "recommended", SCRATCH, BASE, "lose")
    yield Cell("known_states+blocks 128", "recommended", TUNED, BASE)
    for relative, control in ((BASE, ""), (SELF, "win")):
        yield Cell("boundary_prefix 8192", "distillock", TUNED, relative, control)
    yield Cell("boundary_prefix 8192", "recommended", TUNED, BASE)
    yield Cell("boundary_prefix 8192", "recommended", TUNED, SCRATCH, "lose")
    for name in (TUNED, SCRATCH):
        yield Cell("multi_view same", "recommended", name)
        yield Cell("multi_view shallower", "recommended", name)
    yield Cell("multi_view stranger", "recommended", TUNED, "", "lose")
    for name in (TUNED, SCRATCH):
        yield Cell("harvest", "keyed-0", name)
        yield Cell("harvest", "keyed-2", name)
        for tokens in (2048, 32768):
            yield Cell(f"observed {tokens}", "keyed-2", name)
    for tokens in (64, 256, 512):
        yield Cell(f"boundary_head {tokens}", "recommended", SCRATCH)
    for top in (1, 20):
        yield Cell(f"boundary_head 8192 top {top}", "recommended", SCRATCH)
    yield Cell("logit_svd 512", "recommended", SCRATCH, "", "win")
    yield Cell("logit_svd 512 top 20", "recommended", SCRATCH)
    for tokens in (2048, 8192, 32768, 131072):
        yield Cell(f"head_from_tokens {tokens}", "recommended", SCRATCH)
    yield Cell("head_from_tokens 2048", "recommended", TUNED, BASE)
    yield Cell("head_from_tokens 32768", "recommended", TUNED, BASE)
    for name in (TUNED, SCRATCH):
        if name == SCRATCH:
            yield Cell("vocabulary_frequency 65536 questions", "distillock", name)
            yield Cell("vocabulary_frequency 65536 alike", "distillock", name)
            yield Cell("vocabulary_frequency 65536 own", "distillock", name, "", "win")
        for tokens in (2048, 8192, 32768):
            yield Cell(f"vocabulary_predictions {tokens}", "distillock", name)
    yield Cell("vocabulary_rows", "distillock", TUNED, BASE)
    yield Cell("vocabulary_rows", "distillock", TUNED, SELF, "win")
    yield Cell("everything 32768", "distillock", SCRATCH)
    yield Cell("everything 32768", "distillock", TUNED)
    yield Cell("everything 32768", "recommended", SCRATCH)
    yield Cell("everything 32768", "recommended", TUNED, BASE)
    for plan in (name for name in PLANS if name.startswith(("plain", "keyed"))):
        for stand_in in ("random", "relative", "observed"):
            yield Cell(f"no_enclave {stand_in}", plan, TUNED, BASE if stand_in == "relative" else "")
    yield Cell("no_enclave relative", "plain-2", TUNED, SELF, "win")


@dataclass(frozen=True)
class Scene:
    """A victim under a plan, and what only the auditor knows of it."""

    config: PreTrainedConfig
    plain: Tensors
    locked: Tensors
    victim: PlainVictim
    exam: Exam
    head: SealedHead
    true: Key
    words: torch.Tensor  # which token stands at each place of a shuffled head


class Bench:
    """Models and texts, made when they are needed."""

    def __init__(self, texts: Path) -> None:
        self.skills = Skills(texts)

    @cache  # noqa: B019 - one object, as long as the program
    def model(self, name: str) -> PreTrainedModel:
        """A model of the lab."""
        return AutoModelForCausalLM.from_pretrained(LAB / name, dtype=torch.float32).eval()

    @cache  # noqa: B019
    def rows(self, name: str, split: Any, count: int) -> torch.Tensor:
        """[count, LENGTH] token ids: stories and questions; a thief's questions with the victim's own answers."""
        tokenizer, answers = AutoTokenizer.from_pretrained(LAB / name), None
        if split == "attack":
            asked = [p.text for skill in ASKED for p in self.skills.prompts(skill, "attack", 300)]
            answers = complete(self.model(name), tokenizer, asked)
        return pack(self.skills.documents(split, MIXES["attacker"], answers=answers), tokenizer, LENGTH, count)

    @cache  # noqa: B019
    def written(self, name: str, seed: int) -> torch.Tensor:
        """[512, LENGTH] token ids that the model draws by itself."""
        return sample_texts(self.model(name), 512, seed)

    def queries(self, name: str, tokens: int) -> torch.Tensor:
        """Token ids [N, T] of the attack split, `tokens` in all."""
        whole = self.rows(name, "attack", 1024)
        return whole[:1, :tokens] if tokens < LENGTH else whole.flatten()[:tokens].view(-1, LENGTH)

    @cache  # noqa: B019
    def scene(self, plan_name: str, name: str, seed: int) -> Scene:
        """A victim; `seed` is of its key."""
        plan, model = PLANS[plan_name], self.model(name)
        plain = {key: tensor.detach() for key, tensor in model.state_dict().items()}
        config, locked = model.config, dict(plain)
        true = Key(torch.eye(config.hidden_size, dtype=torch.float64))
        if plan.lock == "permuted":
            locked, _ = permuted(config, plain, seed)
        elif plan.lock == "keyed":
            locked = fold_tensors(config, plain, hashlib.sha256(f"key {seed}".encode()).digest())
        if plan.lock != "none":
            true = exact_key(config, plain, locked)
        whole = causal_lm_class(config)(config)
        whole.load_state_dict(dict(locked))
        victim = PlainVictim(whole.eval(), SealedSet.prefix(plan.prefix))
        exam = Exam.of(victim, self.rows(name, "eval", EXAM))
        words = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(1000 + seed))
        if plan.head == "shuffled":
            victim.open_tensors[HEAD] = victim.open_tensors[HEAD][words]
        if plan.head == "sealed":
            del victim.open_tensors[HEAD], victim.open_tensors[NORM]
        return Scene(config, plain, locked, victim, exam, SealedHead(config, locked), true, words)

    def run(self, cell: Cell) -> dict[str, Any]:
        """One attack: its own figures, the auditor's, and the score of the thief's model."""
        scene = self.scene(cell.plan, cell.model, cell.seed)
        relative = None
        if cell.relative:
            relative = scene.plain if cell.relative == SELF else self.model(cell.relative).state_dict()
        findings, truth = self._attack(cell, scene, relative)
        last = findings[-1]
        if last.key is not None and not truth:
            truth = figures(scene.config, last.key, scene.true, scene.locked, None if cell.control else relative)
        if last.words is not None:
            truth |= vocabulary_frequency.mapped(last.words, scene.words, self._drawn(cell, scene))
        result: dict[str, Any] = {
            "tokens": sum(finding.tokens for finding in findings),
            "figures": last.figures,
            "truth": truth,
            "score": None,
        }
        if not any(finding.tensors for finding in findings) and not cell.attack.startswith("no_enclave"):
            return result
        if PLANS[cell.plan].head == "shuffled" and last.words is None:
            findings = [*findings, self._in_order(scene, last.key, relative)]
            if findings[-1].words is not None:
                places = self._drawn(cell, scene)
                truth |= vocabulary_frequency.mapped(findings[-1].words, scene.words, places)
        thief = assemble(scene.victim, *findings, seed=cell.seed)
        result["score"] = score(thief, scene.exam).to_dict()
        if cell.attack.startswith("everything") or cell.attack == "align":
            tokenizer = AutoTokenizer.from_pretrained(LAB / cell.model)
            result["private_skills"] = {
                skill: exact_match(thief, tokenizer, self.skills.prompts(skill, "eval", 50)) for skill in PRIVATE
            }
        return result

    def _in_order(self, scene: Scene, key: Key | None, relative: Tensors | None) -> Finding:
        """A shuffled head in order: by the rows of a relative, if the basis is known, else by the auditor."""
        if key is not None and relative is not None:
            return vocabulary_frequency.by_rows(scene.victim, relative, key.rotation)
        return Finding("given", tensors={HEAD: scene.locked[HEAD]})

    def _drawn(self, cell: Cell, scene: Scene) -> torch.Tensor:
        """The victim's own text as places of the shuffled vocabulary."""
        return scene.words.argsort()[self.written(cell.model, 0)]

    def _attack(self, cell: Cell, scene: Scene, relative: Tensors | None) -> tuple[list[Finding], dict[str, float]]:
        """Findings, the last of which is looked at, and what the auditor has to say of it beside its key."""
        name, *settings = cell.attack.split()
        tokens = int(settings[0]) if settings and settings[0].isdigit() else 0
        victim, top = scene.victim, int(settings[2]) if settings[1:2] == ["top"] else None
        queries = self.queries(cell.model, tokens) if tokens > 1 else torch.empty(0)
        if name in ("gain_sort", "arrow_match", "align") and relative is not None:
            if settings:
                found = align.run(victim, relative).key
                return [arrow_match.run(victim, relative, found.rotation if found else None)], {}
            attack = {"gain_sort": gain_sort, "arrow_match": arrow_match, "align": align}[name]
            return [attack.run(victim, relative)], {}
        if name == "known_row":
            shown = victim.query(300 + 7 * cell.seed + torch.arange(int(settings[0]))[None])[0]
            return [known_row.run(scene.plain[EMBEDDING][scene.words], shown)], {}
        if name.startswith("known_states") and relative is not None:
            return [known_states.run(victim, relative, queries, refine=name.endswith("blocks"))], {}
        if name == "boundary_prefix" and relative is not None:
            return [boundary.run_prefix(victim, relative, queries)], {}
        if name == "boundary_head":
            true = fold_gains({HEAD: scene.locked[HEAD], NORM: scene.locked[NORM]})[HEAD]
            head = boundary.run_head(victim, scene.head, queries, top)
            rest = known_prefix(scene)
            return [rest, head], {"head_error": float((head.tensors[HEAD] - true).norm() / true.norm())}
        if name == "logit_svd":
            logits = scene.head.logits(final_states(victim, queries).flatten(0, 1), top)
            spanned = logit_svd.span(logits, scene.config.hidden_size)
            return [logit_svd.run(logits)], {"head_outside": logit_svd.outside(scene.locked[HEAD], spanned)}
        if name == "head_from_tokens":
            start = self._head_of(victim, relative)
            return [
                known_prefix(scene),
                head_from_tokens.run(victim, scene.head, queries, seed=cell.seed, start=start),
            ], {}
        if name == "relative":
            assert relative is not None
            return [Finding("relative", tensors=relative)], {}
        if name == "multi_view":
            return self._multi_view(cell, scene, settings[0])
        if name == "harvest":
            return [harvest.run(victim)], {}
        if name == "observed":
            return [harvest.observe(victim, queries)], {}
        if name == "vocabulary_frequency":
            drawn = self._drawn(cell, scene)
            public = self._public(cell.model, settings[1])
            return [known_prefix(scene), vocabulary_frequency.by_frequency(victim, drawn, public)], {}
        if name == "vocabulary_predictions":
            return [known_prefix(scene), vocabulary_frequency.by_predictions(victim, queries)], {}
        if name == "vocabulary_rows" and relative is not None:
            key = align.run(victim, relative).key
            assert key is not None
            return [known_prefix(scene), vocabulary_frequency.by_rows(victim, relative, key.rotation)], {}
        if name == "everything":
            return self._everything(cell, scene, relative, queries), {}
        if name == "no_enclave":
            observed = self.queries(cell.model, 8192) if settings[0] == "observed" else None
            return [no_enclave.run(victim, relative, observed)[-1]], {}
        raise ValueError(f"no attack is called {cell.attack!r}")

    def _public(self, name: str, kind: str) -> torch.Tensor:
        """Text to compare frequencies with: more questions than the victim writes, as many, or its own."""
        if kind == "own":
            return self.written(name, 1)
        if kind == "questions":
            return self.rows(name, "attack", 512)
        mix = MIXES[name.removeprefix("lab-")]
        return pack(self.skills.documents("attack", mix), AutoTokenizer.from_pretrained(LAB / name), LENGTH, 512)

    def _head_of(self, victim: PlainVictim, relative: Tensors | None) -> torch.Tensor | None:
        return None if relative is None else align.run(victim, relative).tensors[HEAD]

    def _multi_view(self, cell: Cell, scene: Scene, kind: str) -> tuple[list[Finding], dict[str, float]]:
        """Another customer's bundle: of the same model and plan, with one more block open, or of another model."""
        name = (SCRATCH if cell.model == TUNED else TUNED) if kind == "stranger" else cell.model
        plain = {key: tensor.detach() for key, tensor in self.model(name).state_dict().items()}
        theirs = fold_tensors(scene.config, plain, hashlib.sha256(f"other {cell.seed}".encode()).digest())
        sealed = SealedSet.prefix(1) if kind == "shallower" else scene.victim.sealed
        shown = {
            key: tensor
            for key, tensor in theirs.items()
            if not sealed.holds(key, scene.config) and key not in (HEAD, NORM)
        }
        found = multi_view.run(scene.config, scene.victim.open_tensors, shown)
        assert found.key is not None
        truth = figures(scene.config, found.key, exact_key(scene.config, theirs, scene.locked), scene.locked)
        if not found.tensors:
            return [found], truth
        # What is still sealed in both is given, so that the score is of what the other bundle revealed.
        return [Finding("given", tensors=scene.locked), found], truth

    def _everything(self, cell: Cell, scene: Scene, relative: Tensors | None, queries: torch.Tensor) -> list[Finding]:
        """The best that these attacks give together within a budget of tokens."""
        victim = scene.victim
        if PLANS[cell.plan].head == "shuffled":
            return [harvest.run(victim), vocabulary_frequency.by_predictions(victim, queries)]
        aligned = None if relative is None else align.run(victim, relative).tensors
        theft = sem.run(victim, queries, SEM, cell.seed, aligned)
        known = {n: t for n, t in theft.model.state_dict().items() if victim.sealed.holds(n, scene.config)}
        start = None if aligned is None else aligned[HEAD]
        # The same texts: the tokens that come back from them are counted with their states.
        head = head_from_tokens.run(victim, scene.head, queries, seed=cell.seed, start=start)
        return [Finding("sem", tensors=known), head]


def known_prefix(scene: Scene) -> Finding:
    """The true sealed layers, so that an attack on the head is marked by itself."""
    sealed = {name: t for name, t in scene.locked.items() if scene.victim.sealed.holds(name, scene.config)}
    return Finding("given", tensors=sealed)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="folder with tinystories-sample/tinystories.txt")
    parser.add_argument("--out", type=Path, default=REPO / "docs" / "results" / "locked_weights.jsonl")
    parser.add_argument("--keys", type=int, default=3, help="how many keys each attack is run on")
    parser.add_argument("--only", default="", help="attacks whose names begin so")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="only print what --out holds, in Markdown")
    options = parser.parse_args()
    if options.tables:
        tables(read_lines(options.out))
        return
    if options.texts is None:
        parser.error("give --texts FOLDER, or --tables")
    torch.set_num_threads(options.threads)
    about = machine()
    print_machine(about)
    done = {line["key"] for line in read_lines(options.out)}
    left = [cell for cell in cells(options.keys) if cell.key not in done and cell.attack.startswith(options.only)]
    bench = Bench(options.texts)
    with progress() as bar, options.out.open("a") as file:
        task = bar.add_task("attacks", total=len(left))
        for cell in left:
            bar.update(task, description=f"{cell.attack}, {cell.plan}, {cell.model}, key {cell.seed}")
            bar.refresh()
            started = time.monotonic()
            line = {"key": cell.key, **vars(cell), "commit": about["commit"], **bench.run(cell)}
            line["seconds"] = round(time.monotonic() - started, 2)
            write_line(file, line)
            bar.advance(task)
    tables(read_lines(options.out))


def tables(lines: list[dict[str, Any]]) -> None:
    """Print what was found, a table for each plan: means over keys, with the range of agreement."""
    by_plan: dict[str, dict[tuple[str, ...], list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        row = (line["attack"], line["model"], line["relative"], line["control"])
        by_plan[line["plan"]][row].append(line)
    for plan, rows in by_plan.items():
        print(f"\n### {plan}\n")
        print("| attack | victim | relative | control | tokens | keys | found | agreement | loss | victim's loss |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for (attack, model, relative, control), found in rows.items():
            scores = [line["score"] for line in found if line["score"]]
            values = [attack, model, relative, control, f"{found[0]['tokens']:,}", len(found), _found(found)]
            if scores:
                agreement = [one["agreement"] for one in scores]
                values += [f"{statistics.fmean(agreement):.3f} ({min(agreement):.3f}-{max(agreement):.3f})"]
                values += [f"{statistics.fmean(one[name] for one in scores):.2f}" for name in ("loss", "victim_loss")]
            print("| " + " | ".join(map(str, values)) + " |" + " |" * (10 - len(values)))


def _found(lines: list[dict[str, Any]]) -> str:
    """Means over keys of what the attack and the auditor say, and of the private skills."""
    named: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        for name, value in [*line["figures"].items(), *line["truth"].items()]:
            named[name].append(value)
        if "private_skills" in line:
            named["private_skills"].append(statistics.fmean(line["private_skills"].values()))
    return ", ".join(f"{name.replace('_', ' ')} {statistics.fmean(values):.3g}" for name, values in named.items())


if __name__ == "__main__":
    main()
