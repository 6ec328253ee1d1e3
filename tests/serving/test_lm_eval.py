"""lm-eval against the served, sealed model gives the scores that it gives with the original in its own process.

lm-eval and what it needs are large, so they are not among the packages of `dev`: `pip install 'semiopen[eval]'`.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.serving.running_server import MODEL

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs semiopen[eval]")

ENDINGS = [
    ("Once upon a time, there was a little", ["girl named Lily.", "number of twelve.", "the of to and."], 0),
    ("The dog wanted to play with the", ["seven.", "ball.", "because."], 1),
    ("Tom was sad because he lost his", ["quickly", "are", "toy"], 2),
    ("Mom said, \"Let's go to the", ['park."', 'green."', 'swimmed."'], 0),
    ("They were very happy and", ["bicycle the", "played together all day.", "is"], 1),
]
TASKS = {
    "endings": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[answer]}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
# In a process of its own: lm-eval changes logging and warnings, and imports half of the world.
JOB = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
url, model, folder, out = sys.argv[1:]
manager = TaskManager(include_path=folder, include_defaults=False)
remote = {"base_url": url + "/v1/completions", "model": "stories", "tokenizer": model, "max_length": 512,
          "tokenizer_backend": "huggingface", "num_concurrent": 2, "max_retries": 1,
          "add_bos_token": True}
runs = {
    "original": ("hf", {"pretrained": model, "dtype": "float32", "device": "cpu", "max_length": 512}),
    "tokens": ("local-completions", {**remote, "tokenized_requests": True, "batch_size": 4}),
    "texts": ("local-completions", {**remote, "tokenized_requests": False}),
}
results = {}
for name, (kind, arguments) in runs.items():
    done = lm_eval.simple_evaluate(kind, model_args=arguments, tasks=["endings", "perplexity", "writing"],
                                   task_manager=manager, bootstrap_iters=0, log_samples=True)
    samples = {task: [[s["doc_id"], s["filtered_resps"]] for s in rows] for task, rows in done["samples"].items()}
    results[name] = {"results": done["results"], "samples": samples}
json.dump(results, open(out, "w"))
"""


@pytest.fixture(scope="module")
def results(served_stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    data = folder / "endings.jsonl"
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in ENDINGS]
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + text)
    environment = {
        **os.environ,
        "OPENAI_API_KEY": "key-of-tests",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    out = folder / "out.json"
    command = [sys.executable, "-c", JOB, served_stories.url, str(MODEL), str(folder), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("how", ["tokens", "texts"])
def test_scores_are_the_originals(results, how):
    for task, original in results["original"]["results"].items():
        for metric, value in original.items():
            if isinstance(value, float):
                assert results[how]["results"][task][metric] == pytest.approx(value, abs=1e-4), (task, metric)


@pytest.mark.parametrize("how", ["tokens", "texts"])
def test_each_loglikelihood_is_the_originals(results, how):
    def scores(name):
        return [pair for _, answers in sorted(results[name]["samples"]["endings"]) for pair in answers]

    original, served = scores("original"), scores(how)
    assert len(original) == 15
    assert [float(score) for score, _ in served] == pytest.approx([float(score) for score, _ in original], abs=1e-3)
    assert [greedy for _, greedy in served] == [greedy for _, greedy in original]


@pytest.mark.parametrize("how", ["tokens", "texts"])
def test_each_text_is_the_originals(results, how):
    assert sorted(results[how]["samples"]["writing"]) == sorted(results["original"]["samples"]["writing"])


def test_the_tasks_can_tell_models_apart(results):
    """Or equal scores would mean nothing."""
    assert 0.3 < results["original"]["results"]["endings"]["acc,none"] <= 1
    assert results["original"]["results"]["perplexity"]["word_perplexity,none"] < 1e4
    assert any(answer[0].strip() for _, answer in results["original"]["samples"]["writing"])
