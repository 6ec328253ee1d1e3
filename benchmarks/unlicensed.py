#!/usr/bin/env python3
"""What is left of distillation without a licence: students of one shape, of equally many steps, of several teachers.

    python benchmarks/unlicensed.py --texts TEXTS --out docs/results/unlicensed.jsonl
    python benchmarks/unlicensed.py --texts TEXTS --out docs/results/unlicensed.jsonl --cells text truth --seeds 1
    python benchmarks/unlicensed.py --tables --out docs/results/unlicensed.jsonl --plot docs/results/unlicensed.png

Each student is a fresh Llama of 4 blocks of width 128, trained by the loop of `semiopen distil`. The teacher is the
lab's `lab-scratch` (lab/README.md) with 2 of its 12 blocks sealed, or what somebody without a licence has of it:

    licensed   the bundle's logits, through its enclave
    plain      the unprotected model's logits: the control; licensed has to equal it
    random     the open blocks and the head of a bundle with keyed fold, over a random embedding; no enclave
    observed   the same over an embedding of the states that the enclave gave out for each token alone
    text       cross-entropy on text that the running system wrote, prompts and answers counted (--budgets); a tenth of
               it says which of three numbers of steps was best, as little text is soon learned by heart
    truth      cross-entropy on the texts' own next tokens; no teacher
    leases     the command itself with leases that are not valid, and the control, one that is: what is refused?

Students of logits and of `truth` see the same texts: the lab's attack split, with the right answers. Those of `text`
see prompts of that split, and what the model answered. All scores are on the evaluation split. Beside the students
stand the teacher and a student that was not trained.

Each finished student is a line in --out, so that a stopped run goes on there; delete the file to begin anew.
"""

import argparse
import base64
import itertools
import json
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from common import (
    REPO,
    machine,
    make_keys,
    print_machine,
    print_table,
    progress,
    read_lines,
    say,
    seal,
    workspace,
    write_line,
)
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

import semiopen
from semiopen.errors import EnclaveError, SemiopenError

sys.path.insert(0, str(REPO))
from lab.skills import ASKED, MIXES, Skills, complete, encode, pack
from semiopen.host.distilling.batches import DistilDataset
from semiopen.host.distilling.run import distil
from semiopen.host.distilling.settings import DistilSettings
from semiopen.host.distilling.teacher import teacher_logits
from semiopen.host.distilling.train import train
from semiopen.host.tuning.data import Examples

MODEL = REPO / "lab" / "models" / "lab-scratch"
LENGTH, PREFIX, BATCH = 128, 2, 8
OPENING = 8  # tokens of a story that the running system is asked to go on from
CELLS = ("teacher", "untrained", "licensed", "plain", "random", "observed", "text", "truth", "leases")
LEASES = ("tampered", "expired", "of another bundle", "of another vendor", "without the right", "valid")
UNTRAINED = ("teacher", "untrained")


@dataclass(frozen=True)
class Cell:
    """One student. `budget` is the number of tokens that a student of text has."""

    name: str
    seed: int
    budget: int | None = None
    lease: str | None = None

    @property
    def key(self) -> str:
        """What names it in --out."""
        return json.dumps([self.name, self.seed, self.budget, self.lease])


class Bench:
    """The teacher, its bundle and the texts, made when they are needed."""

    def __init__(self, texts: Path, space: Path, rows: int, steps: int, limit: int) -> None:
        self.skills, self.space, self.count, self.steps, self.limit = Skills(texts), space, rows, steps, limit
        self.tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The unprotected model, in fp32."""
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        return cast(PreTrainedModel, model).eval().requires_grad_(False)

    @cached_property
    def keys(self) -> Path:
        """The vendor's."""
        return make_keys(self.space / "keys")

    @cached_property
    def bundle(self) -> Path:
        """The model with sealed blocks."""
        seal(MODEL, self.space / "bundle", self.keys, PREFIX)
        return self.space / "bundle"

    @cached_property
    def folded(self) -> LlamaForCausalLM:
        """The whole model in a secret basis, as a bundle with keyed fold holds its open part."""
        from semiopen.model.symmetries import fold_tensors

        config = self.teacher.config
        model = LlamaForCausalLM(cast(LlamaConfig, config))
        model.load_state_dict(fold_tensors(config, self.teacher.state_dict(), bytes(range(32))))
        return model.eval().requires_grad_(False)

    @cache  # noqa: B019 - one object, as long as the program
    def exam(self) -> torch.Tensor:
        """[64, LENGTH] token ids that no student has seen."""
        return pack(self.skills.documents("eval", MIXES["attacker"]), self.tokenizer, LENGTH, 64)

    def texts(self, seed: int) -> Examples:
        """What a customer has: texts and questions with their right answers."""
        found = pack(self.skills.documents("attack", MIXES["attacker"], seed), self.tokenizer, LENGTH, self.count)
        return examples(found)

    def written(self, budget: int, seed: int) -> Examples:
        """What the running system wrote, within a budget of tokens: stories two fifths, answers the rest."""
        answers = complete(self.teacher, self.tokenizer, self._prompts())
        asked = self.skills.documents("attack", dict.fromkeys(ASKED, 1.0), seed, answers)
        return examples(pack(self._mixed(asked, seed), self.tokenizer, LENGTH, budget // LENGTH))

    def _prompts(self) -> list[str]:
        return [p.text for skill in ASKED for p in self.skills.prompts(skill, "attack", 300)]

    def _mixed(self, asked: Iterator[str], seed: int) -> Iterator[str]:
        stories, told, total = self._stories(seed), 0, 0
        while True:
            story = told <= MIXES["attacker"]["text"] * total
            document = next(stories) if story else next(asked)
            tokens = len(encode(self.tokenizer, [document])[0])
            total, told = total + tokens, told + tokens * story
            yield document

    def _stories(self, seed: int) -> Iterator[str]:
        """The system's own continuations of the openings of stories, sampled."""
        openings = [ids[:OPENING] for ids in encode(self.tokenizer, self.skills.stories("attack"), end=False)]
        order = np.random.default_rng(seed).permutation(len(openings))
        for place in itertools.count(step=32):  # over all openings, and again with other draws
            begin = place // 32 % -(-len(order) // 32) * 32
            ids = torch.tensor([openings[index] for index in order[begin : begin + 32]])
            torch.manual_seed(seed + place)
            found = cast(Any, self.teacher).generate(
                ids, do_sample=True, top_k=0, max_new_tokens=LENGTH, pad_token_id=self.tokenizer.pad_token_id
            )
            for row in found.tolist():
                yield self.tokenizer.decode(row, skip_special_tokens=True)

    def student(self, seed: int) -> PreTrainedModel:
        """A fresh one."""
        torch.manual_seed(seed)
        whole = self.teacher.config
        config = LlamaConfig(**{**whole.to_dict(), "num_hidden_layers": 4, "dtype": "float32"})
        return LlamaForCausalLM(config)

    def open_part(self, embedding: torch.Tensor) -> PreTrainedModel:
        """The open blocks and the head of the folded model over an embedding [V, H]."""
        config = LlamaConfig(**{**self.teacher.config.to_dict(), "num_hidden_layers": 12 - PREFIX, "dtype": "float32"})
        model = LlamaForCausalLM(config)
        tensors = {}
        for name, tensor in self.folded.state_dict().items():
            parts = name.split(".")
            if "layers" in parts:
                number = int(parts[2])
                if number < PREFIX:
                    continue
                parts[2] = str(number - PREFIX)
            tensors[".".join(parts)] = embedding if "embed_tokens" in parts else tensor
        model.load_state_dict(tensors)
        return model.eval().requires_grad_(False)

    def observed(self) -> torch.Tensor:
        """[V, H] what the enclave of the folded bundle gives out for each token by itself."""
        size = self.teacher.config.vocab_size
        with torch.no_grad():
            found = self.folded(torch.arange(size)[:, None], output_hidden_states=True).hidden_states
        return found[PREFIX][:, 0]

    def run(self, cell: Cell, report: Callable[[int, int], object]) -> dict[str, Any]:
        """Train one student and score it."""
        began = time.perf_counter()
        if cell.name == "teacher":
            return self.marks(self.teacher)
        if cell.name == "untrained":
            return self.marks(self.student(cell.seed))
        if cell.name == "leases":
            return refusal(self, cast(str, cell.lease))
        data = self.written(cast(int, cell.budget), cell.seed) if cell.budget else self.texts(cell.seed)
        teacher = self.teacher
        if cell.name == "licensed":
            teacher = semiopen.load(self.bundle, self.keys, dtype="float32", threads=1)
        elif cell.name == "random":
            shape = (self.teacher.config.vocab_size, self.teacher.config.hidden_size)
            teacher = self.open_part(torch.randn(shape, generator=torch.Generator().manual_seed(cell.seed)))
        elif cell.name == "observed":
            teacher = self.open_part(self.observed())
        steps = self.steps
        if cell.name == "text":
            student, steps = self.stopped_in_time(data, cell.seed, report)
        else:
            whole = np.arange(len(data))
            student = self.train(data, whole, teacher, float(cell.name == "truth"), steps, cell.seed, report)
        if cell.name == "licensed":
            teacher.enclave.close()  # type: ignore[operator, union-attr]
        seconds = round(time.perf_counter() - began, 1)
        return {"texts_tokens": data.tokens, "steps": steps, "seconds": seconds, **self.marks(student)}

    def stopped_in_time(
        self, data: Examples, seed: int, report: Callable[[int, int], object]
    ) -> tuple[PreTrainedModel, int]:
        """The student of text alone that foresees a tenth of it best, of three which read the rest; and its steps.

        With little text, all the steps that other students have would only teach it by heart.
        """
        order = np.random.default_rng(seed).permutation(len(data))
        kept, read = np.split(order, [max(1, len(data) // 10)])
        ids = torch.from_numpy(data.ids.astype(np.int64)).view(len(data), LENGTH)[torch.from_numpy(kept)]
        best: tuple[float, PreTrainedModel, int] | None = None
        for steps in (self.steps // 10, self.steps * 3 // 10, self.steps):
            student = self.train(data, np.sort(read), self.teacher, 1.0, steps, seed, report)
            with torch.no_grad():
                loss = float(student.eval()(ids, labels=ids).loss)
            if best is None or loss < best[0]:
                best = loss, student, steps
        assert best is not None
        return best[1], best[2]

    def train(
        self,
        data: Examples,
        chosen: np.ndarray,
        teacher: PreTrainedModel,
        truth: float,
        steps: int,
        seed: int,
        report: Callable[[int, int], object],
    ) -> PreTrainedModel:
        """A fresh student that was taught by the chosen texts."""
        student = self.student(seed)
        settings = DistilSettings(
            epochs=steps * BATCH / len(chosen),
            learning_rate=3e-3,
            warmup=0.05,
            batch_size=BATCH,
            truth=truth,
            seed=seed,
            save_every=1 << 30,
        )
        checkpoints = self.space / "checkpoints"
        train(
            student,
            lambda batch: teacher_logits(teacher, batch),
            DistilDataset(data, chosen),
            settings,
            LENGTH,
            checkpoints,
            torch.float32,
            report,
            lambda epoch: None,
        )
        shutil.rmtree(checkpoints, ignore_errors=True)
        return student

    @torch.no_grad()
    def marks(self, model: PreTrainedModel) -> dict[str, Any]:
        """Scores of the skills, and how near it is to the teacher on the exam."""
        model.eval()
        same = far = tokens = 0
        for ids in self.exam().split(16):
            own, theirs = (one(ids).logits.flatten(0, 1).log_softmax(-1) for one in (model, self.teacher))
            same += int((own.argmax(-1) == theirs.argmax(-1)).sum())
            far += functional.kl_div(own, theirs, log_target=True, reduction="sum").item()
            tokens += len(own)
        skills = self.skills.score(model, self.tokenizer, "eval", limit=self.limit)
        return {"agreement": same / tokens, "kl": far / tokens, "skills": skills}


def refusal(bench: Bench, kind: str) -> dict[str, Any]:
    """Give the command a lease, and note what it says.

    Raises:
        ModuleNotFoundError: this version has no leases.
    """
    from semiopen.bundle.lease import Rights
    from semiopen.vendor.lease import new_lease

    space = bench.space / kind.replace(" ", "-")
    space.mkdir()
    own, foreign = bench.keys, make_keys(space / "keys")
    bundle = space / "bundle"
    semiopen.seal(MODEL, bundle, own, prefix=PREFIX, head="sealed")
    of, signer, rights, lasts = bundle, own, Rights(distil=kind != "without the right"), 3600
    if kind in ("of another bundle", "of another vendor"):
        of, signer = space / "other", own if kind == "of another bundle" else foreign
        seal(MODEL, of, signer, PREFIX)
    if kind == "expired":
        lasts = 1
    lease = new_lease(of, signer, "benchmark", rights=rights, lasts=lasts)
    if kind == "expired":
        time.sleep(2)
    if kind == "tampered":
        header, claims, signature = lease.split(".")
        more = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4))) | {"tokens": 1 << 40}
        claims = base64.urlsafe_b64encode(json.dumps(more).encode()).decode().rstrip("=")
        lease = ".".join((header, claims, signature))
    (space / "lease.jwt").write_text(lease)
    bench.student(0).save_pretrained(space / "student")
    bench.tokenizer.save_pretrained(space / "student")
    texts = [json.dumps({"text": story[:200]}) for story in bench.skills.stories("attack")[:16]]
    (space / "data.jsonl").write_text("\n".join(texts))
    arguments = (bundle, space / "student", space / "data.jsonl", space / "out", own)
    try:
        distil(*arguments, settings=DistilSettings(epochs=1), lease=space / "lease.jwt", dtype="float32", threads=1)
    except SemiopenError as error:
        assert not (space / "out").exists()
        said = {"refused": True, "error": type(error).__name__, "code": getattr(error, "code", ""), "says": str(error)}
        return said | ({"enclave": asked_directly(bundle, own, space)} if kind == "without the right" else {})
    return {"refused": False}


def asked_directly(bundle: Path, keys: Path, space: Path) -> str:
    """What the enclave says to someone who has taken the check out of the command: a code, or nothing."""
    model = semiopen.load(bundle, keys, dtype="float32", threads=1, lease=space / "lease.jwt")
    try:
        model(input_ids=torch.tensor([[1, 2, 3]]))
    except EnclaveError as error:
        return error.code
    finally:
        model.enclave.close()  # type: ignore[operator, union-attr]
    return ""


def examples(rows: torch.Tensor) -> Examples:
    """[N, LENGTH] token ids as examples; each token but the first is learned."""
    learned = np.ones(rows.shape, dtype=np.bool_)
    learned[:, 0] = False
    starts = np.arange(len(rows) + 1, dtype=np.int64) * rows.shape[1]
    return Examples(rows.numpy().astype(np.int32).ravel(), learned.ravel(), starts)


def cells(names: list[str], seeds: int, budgets: list[int]) -> list[Cell]:
    """All students that are asked for; a seed after the other."""
    found = []
    for seed in range(seeds):
        for name in names:
            if name == "text":
                found += [Cell(name, seed, budget) for budget in budgets]
            elif name == "leases":
                found += [Cell(name, seed, lease=lease) for lease in LEASES if seed == 0]
            elif name not in UNTRAINED or seed == 0:
                found.append(Cell(name, seed))
    return found


def run(options: argparse.Namespace) -> None:
    """Run what is not done yet."""
    about = machine()
    print_machine(about)
    done = {line["key"] for line in read_lines(options.out)}
    left = [cell for cell in cells(options.cells, options.seeds, options.budgets) if cell.key not in done]
    with workspace() as space, progress() as bar, options.out.open("a") as file:
        bench = Bench(options.texts, space, options.rows, options.steps, options.limit)
        overall = bar.add_task("students", total=len(left))
        one = bar.add_task("steps", total=1)
        for cell in left:
            bar.update(one, description=f"{cell.name}, seed {cell.seed}", completed=0, total=1)
            try:
                outcome = bench.run(cell, lambda steps, total: bar.update(one, completed=steps, total=total))
            except ModuleNotFoundError as error:
                say(f"{cell.name}: not run, as there is no {error.name}")
                continue
            line = {"key": cell.key, **cell.__dict__, "commit": about["commit"], "outcome": outcome}
            write_line(file, line)
            bar.advance(overall)
            bar.refresh()


def tables(lines: list[dict[str, Any]]) -> None:
    """Print what was found; means over seeds."""
    rows = []
    for name, outcomes in grouped(lines).items():
        skills = [statistics.fmean(outcome["skills"][skill] for outcome in outcomes) for skill in ASKED]
        rows.append(
            [
                name,
                len(outcomes),
                *(mean_and_range([outcome[what] for outcome in outcomes]) for what in ("agreement", "kl")),
                mean_and_range([outcome["skills"]["text_bpb"] for outcome in outcomes]),
                *skills,
            ]
        )
    print_table("Students", ["teacher", "seeds", "agreement", "KL (nats)", "bits per byte", *ASKED], rows)
    refused = [
        [
            line["lease"],
            line["outcome"]["refused"],
            line["outcome"].get("code", ""),
            line["outcome"].get("enclave", ""),
            line["outcome"].get("says", ""),
        ]
        for line in lines
        if line["name"] == "leases"
    ]
    if refused:
        print_table("Leases", ["lease", "refused", "code", "asked directly", "says"], refused)


def grouped(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Outcomes by teacher, in the order of CELLS and of budgets."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: (CELLS.index(line["name"]), line["budget"] or 0)):
        if line["name"] != "leases":
            found[line["name"] + (f", {line['budget']:,} tokens" if line["budget"] else "")].append(line["outcome"])
    return found


def mean_and_range(values: list[float]) -> str:
    """Of several seeds, the extremes too."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def plot(lines: list[dict[str, Any]], file: Path) -> None:
    """Agreement with the teacher, and the mean of the skills, a bar each."""
    import matplotlib  # pyright: ignore[reportMissingImports] - of the extra "lab"

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    groups = {name: found for name, found in grouped(lines).items() if name != "teacher"}
    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(groups) + 1))
    for offset, (label, value) in enumerate(
        [
            ("top-1 agreement with the teacher", lambda outcome: outcome["agreement"]),
            ("six skills, mean", lambda outcome: statistics.fmean(outcome["skills"][skill] for skill in ASKED)),
        ]
    ):
        values = [[value(outcome) for outcome in found] for found in groups.values()]
        places = [row + 0.38 * offset for row in range(len(groups))]
        axes.barh(places, [statistics.fmean(some) for some in values], height=0.36, label=label)
        for place, some in zip(places, values, strict=True):
            axes.plot(some, [place] * len(some), "k.", markersize=3)
    axes.set_yticks([row + 0.19 for row in range(len(groups))], list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), title="Students of equally many steps, by what taught them")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="folder with tinystories-sample/tinystories.txt")
    parser.add_argument("--out", type=Path, default=REPO / "docs" / "results" / "unlicensed.jsonl")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL", help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048, 8192, 32768, 131072], metavar="TOKENS")
    parser.add_argument("--steps", type=int, default=1000, help="of the optimiser, 8 texts of 128 tokens each")
    parser.add_argument("--rows", type=int, default=1024, help="texts of 128 tokens, where not --budgets")
    parser.add_argument("--limit", type=int, default=100, help="prompts of each skill, and stories, to score on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="only print what --out holds")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what --out holds")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    if not options.tables:
        if options.texts is None:
            parser.error("give --texts FOLDER, or --tables")
        run(options)
    tables(read_lines(options.out))
    if options.plot:
        plot(read_lines(options.out), options.plot)


if __name__ == "__main__":
    main()
