"""Seconds for a thousand questions of the LM Evaluation Harness: gptpl's suite and the harness's own `hf`.

    pip install 'gptpl[eval]' transformers accelerate
    python experiments/evaluation_harness/measure.py          # result.json

Each contestant is a process of its own that runs one task when it is its turn. On a busy machine CPU time
is the figure to read: it is what the wall clock shows on an idle one.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCES = {"hellaswag": "hellaswag/rc_0shot", "arc_easy": "arc_easy/rc_0shot", "lambada": "lambada/bpb_0shot"}
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
LAST_WORD = """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
CONTESTANTS = ("gptpl", "hf 1", "hf 8", "hf 16", "hf 32")
"""`hf` with its batch size."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS)
    parser.add_argument("--contestant", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contestant(*options.contestant, threads=options.threads)
        return
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        prepare(folder, options.questions)
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"), "1")
        threads = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive"}
        environment = os.environ | offline | threads | {"HF_HOME": str(folder / "cache")}
        program = [sys.executable, __file__, "--threads", str(options.threads), "--contestant"]
        running = {}
        for name in options.contestants:
            running[name] = subprocess.Popen(
                [*program, name, str(folder)],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True,
            )  # fmt: skip
            answer(running[name])  # is ready
        record: dict[str, Any] = {
            "machine": {"cores": os.cpu_count(), "threads": options.threads},
            "versions": {each: version(each) for each in ("lm_eval", "transformers", "torch")},
            "questions": options.questions,
            "load": [],
            "tasks": {task: {name: {"seconds": [], "cpu": []} for name in running} for task in SOURCES},
        }
        for turn in range(options.rounds):
            for task, found in record["tasks"].items():
                for name in list(running)[:: 1 if turn % 2 == 0 else -1]:
                    record["load"].append(round(os.getloadavg()[0], 1))
                    assert running[name].stdin is not None
                    print(task, file=running[name].stdin, flush=True)
                    said = answer(running[name])
                    for clock in ("seconds", "cpu"):
                        found[name][clock].append(round(said[clock], 2))
                    found[name]["figures"] = said["figures"]
                    times = f"{said['seconds']:.1f} s, CPU {said['cpu']:.1f} s"
                    print(turn, task, name, times, said["figures"], flush=True)
            report(record)
        for process in running.values():
            process.communicate("")


def prepare(folder: Path, questions: int) -> None:
    """The questions as tasks of the harness, and GPT-2 small with random weights as Hugging Face's folder."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from gptpl.evaluation.questions import OlmoQuestions
    from gptpl.tokenizers import GPT2Tokenizer
    from gptpl.tokenizers.hugging_face import write_tokenizer

    (folder / "tasks").mkdir()
    for task, source in SOURCES.items():
        rows = [
            {
                "context": question.answers[0][0],
                "choices": [answer for _, answer in question.answers],
                "gold": question.gold,
            }
            for question in itertools.islice(OlmoQuestions(name=source).read(), questions)
        ]
        file = folder / f"{task}.json"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test"
        kind = LAST_WORD if task == "lambada" else CHOICES
        (folder / "tasks" / f"{task}.yaml").write_text(f"task: {task}\n{data}{kind}")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder / "gpt2")
    write_tokenizer(GPT2Tokenizer(), folder / "gpt2", context_length=1024)


def contestant(name: str, given: str, *, threads: int) -> None:
    """Run each task that a line names, and print its figures and seconds, with reading the data."""
    import torch
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(threads)
    folder = Path(given)
    include = str(folder / "tasks")
    if name == "gptpl":
        import gptpl
        from gptpl.evaluation.harness import Harness
        from gptpl.evaluation.suite import ModelFacts

        model = gptpl.load(folder / "gpt2")
        facts = ModelFacts.of("GPT-2 small", model.net, model.tokenizer)

        def run(task: str) -> dict[str, float]:
            result = Harness(tasks=[task], include_path=include).run(model.net, model.tokenizer, model=facts)
            return {metric: each.value for metric, each in result.tasks[task].metrics.items()}

    else:
        from lm_eval.models.huggingface import HFLM

        theirs = HFLM(
            pretrained=str(folder / "gpt2"), device="cpu", dtype="float32", batch_size=int(name.split()[1])
        )

        def run(task: str) -> dict[str, float]:
            loaded = TaskManager(include_path=include, include_defaults=False).load([task])
            loaded["tasks"][task].set_config(key="num_fewshot", value=0)
            figures = evaluate(theirs, loaded, bootstrap_iters=0)["results"][task]
            return {key.removesuffix(",none"): each for key, each in figures.items() if key.endswith(",none")}

    said, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"ready": True}), file=said, flush=True)
    for line in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        figures = run(line.strip())
        seconds, cpu = time.perf_counter() - start, time.process_time() - used
        figures = {metric: each for metric, each in figures.items() if isinstance(each, float)}
        print(json.dumps({"seconds": seconds, "cpu": cpu, "figures": figures}), file=said, flush=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a contestant ended: run it alone with --contestant to see why")
    return json.loads(line)


def report(record: dict[str, Any]) -> None:
    """Medians, and within each turn the ratio to gptpl; write `result.json`."""
    thousand = 1000 / record["questions"]
    for found in record["tasks"].values():
        for each in found.values():
            for clock in ("seconds", "cpu"):
                own = found["gptpl"][clock]
                each[f"{clock}_per_thousand"] = round(statistics.median(each[clock]) * thousand, 1)
                ratios = [theirs / ours for theirs, ours in zip(each[clock], own, strict=True)]
                each[f"{clock}_ratio"] = [round(pick(ratios), 2) for pick in (min, statistics.median, max)]
    (HERE / "result.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
