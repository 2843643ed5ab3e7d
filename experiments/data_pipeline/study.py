"""How fast a corpus is encoded, opened and read, what a kill costs, and a corpus larger than the disk.

    python experiments/data_pipeline/study.py                          # all parts
    python experiments/data_pipeline/study.py speed --megabytes 200

The text is that of the `.py`, `.md`, `.txt` and `.rst` files below FOLDER, repeated up to so many megabytes.
Every program is a process of its own; its peak memory is that of all its processes, as Linux counts them.
Peers are left out where they are not installed: pip install datasets litdata.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tqdm import tqdm

HERE = Path(__file__).parent
PARTS = ("speed", "kills", "opening", "loader", "tokenizers", "extremes")
SUFFIXES = (".py", ".md", ".txt", ".rst")
SMALL_FILES = 100_000
VAL_TOKENS = 2_000_000

ENCODE = """
import sys, time
from gptpl.data.pretraining.shards import encode_documents
from gptpl.data.sources import TextFiles
from gptpl.tokenizers import GPT2Tokenizer
from pathlib import Path

if __name__ == "__main__":
    started = time.perf_counter()
    text, cache = TextFiles(sys.argv[1], pattern=None), Path(sys.argv[2])
    found = encode_documents(text, GPT2Tokenizer(), val_tokens=2_000_000, cache_dir=cache)
    print(found.stats.train_tokens + found.stats.val_tokens, time.perf_counter() - started)
"""
# One process, one document after the other, nothing kept: what all others are compared with.
TIKTOKEN = """
import sys, time
import tiktoken
from gptpl.tokenizers.gpt2 import _encoding
encoding, total = _encoding(), 0
started = time.perf_counter()
with open(sys.argv[1], encoding="utf-8") as file:
    while text := file.read(1 << 20):
        total += len(encoding.encode_to_numpy(text, disallowed_special=()))
print(total, time.perf_counter() - started)
"""
# As nanoGPT's data/openwebtext/prepare.py: datasets.map in two processes, then one memory-mapped file.
DATASETS = """
import sys, time
import numpy as np, datasets
from gptpl.tokenizers.gpt2 import _encoding
datasets.disable_progress_bars()

def process(example):
    ids = _encoding().encode_ordinary(example["text"])
    ids.append(50256)
    return {"ids": ids, "len": len(ids)}

if __name__ == "__main__":
    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
    done = rows.map(process, remove_columns=["text"], num_proc=2)
    total = np.sum(done["len"], dtype=np.uint64)
    out = np.memmap(sys.argv[2] + "/train.bin", dtype=np.uint16, mode="w+", shape=(int(total),))
    place = 0
    for shard in range(64):
        batch = done.shard(num_shards=64, index=shard, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        out[place : place + len(ids)] = ids
        place += len(ids)
    out.flush()
    print(int(total), time.perf_counter() - started)
"""
LITDATA = """
import sys, time, glob
import torch, litdata
from gptpl.tokenizers.gpt2 import _encoding

def tokenize(path):
    import json
    for line in open(path):
        ids = _encoding().encode_to_numpy(json.loads(line)["text"], disallowed_special=())
        yield torch.from_numpy(ids.astype("int32"))

if __name__ == "__main__":
    started = time.perf_counter()
    litdata.optimize(
        fn=tokenize, inputs=sorted(glob.glob(sys.argv[1] + "/*.jsonl")), output_dir=sys.argv[2] + "/out",
        chunk_size=2**21 * 4, item_loader=litdata.TokensLoader(), num_workers=2,
    )
    print(0, time.perf_counter() - started)
"""


# ------------------------------------------------------------------------------------------------- text


def documents(folder: Path, size: int) -> Iterator[str]:
    """Texts of files, in random order, over and over, up to `size` characters."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    random.Random(0).shuffle(paths)
    total = 0
    for path in itertools.cycle(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if not text.strip() or "\0" in text:
            continue
        yield text
        total += len(text)
        if total >= size:
            return


def write_corpora(source: Path, place: Path, size: int) -> None:
    """The same text as one file, as many small ones, and as JSON Lines in 16 files."""
    for name in ("one", "many", "lines"):
        (place / name).mkdir(parents=True)
    texts = list(documents(source, size))
    whole = "".join(text if text.endswith("\n") else text + "\n" for text in texts)
    (place / "one/all.txt").write_text(whole, encoding="utf-8")
    width = max(1, len(whole) // SMALL_FILES)
    start = 0
    for number in itertools.count():
        end = whole.find("\n", start + width) + 1 or len(whole)
        folder = place / f"many/{number // 1000:03}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:06}.txt").write_text(whole[start:end] or "\n", encoding="utf-8")
        start = end
        if start >= len(whole):
            break
    for number in range(16):
        with (place / f"lines/{number:02}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts[number::16])


# ------------------------------------------------------------------------------------------------ parts


def timed(program: str, *arguments: object) -> dict[str, float]:
    """Tokens, the seconds that a program says it took, those of the process, and its peak memory in MB."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "program.py")
        script.write_text(program)
        command = [sys.executable, str(script), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        peak = worker = 0
        while process.poll() is None:
            own = psutil.Process(process.pid)
            try:
                each = [p.memory_full_info().pss for p in (own, *own.children(recursive=True))]
            except psutil.Error:
                continue
            peak, worker = max(peak, sum(each)), max(worker, *each)
            time.sleep(0.2)
        out, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"{command[1]} failed:\n{error}")
    tokens, seconds = out.split()[-2:]
    return {
        "tokens": int(tokens),
        "seconds": round(float(seconds), 1),
        "process_seconds": round(time.perf_counter() - started, 1),
        "peak_mb": round(peak / 1e6),
        "largest_process_mb": round(worker / 1e6),
    }


def speed(place: Path, megabytes: int, rounds: int) -> dict[str, Any]:
    """All programs in turn."""
    programs = {
        "tiktoken, one process": (TIKTOKEN, place / "one/all.txt"),
        "gptpl, one file": (ENCODE, place / "one"),
        "gptpl, 100,000 files": (ENCODE, place / "many"),
        "gptpl, JSON Lines": (ENCODE, place / "lines"),
        "nanoGPT's prepare.py (datasets.map)": (DATASETS, place / "lines/*.jsonl"),
        "litdata optimize": (LITDATA, place / "lines"),
    }
    for module, name in (
        ("datasets", "nanoGPT's prepare.py (datasets.map)"),
        ("litdata", "litdata optimize"),
    ):
        try:
            __import__(module)
        except ImportError:
            del programs[name]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _, (name, (program, text)) in tqdm([*itertools.product(range(rounds), programs.items())], unit="run"):
        with tempfile.TemporaryDirectory(dir=place) as cache:
            found[name].append(timed(program, text, cache))
    files = sum(1 for _ in (place / "many").rglob("*.txt"))
    table = {}
    for name, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        table[name] = {
            "tokens": runs[0]["tokens"],
            "seconds": seconds,
            "mb_per_second": round(megabytes / seconds, 2),
            "peak_mb": max(run["peak_mb"] for run in runs),
            "largest_process_mb": max(run["largest_process_mb"] for run in runs),
        }
    return {"megabytes": megabytes, "rounds": rounds, "small_files": files, "programs": table}


def kills(place: Path, times: int) -> dict[str, Any]:
    """Kill the encoding again and again: are the bytes those of one that was not, and what is done twice?"""
    undisturbed = place / "undisturbed"
    base = timed(ENCODE, place / "one", undisturbed)
    draw, cache, lost = random.Random(1), place / "killed", []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "program.py")
        script.write_text(ENCODE)
        killed = 0
        with tqdm(total=times, unit="kill") as bar:
            while killed < times:
                command = [sys.executable, str(script), str(place / "one"), str(cache)]
                process = subprocess.Popen(
                    command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
                )
                before = finished(cache)
                time.sleep(1.5 + draw.random() * base["seconds"] / 8)
                if process.poll() is not None:
                    shutil.rmtree(cache)
                    continue
                if killed % 2:
                    os.kill(process.pid, signal.SIGKILL)  # the workers have to notice
                    time.sleep(1)
                else:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
                bar.update()
                # Shards that were begun and are not finished: those are done again.
                lost.append(len({path.name[1:7] for path in cache.glob("shards/*/*/.*.bin.*.tmp")}))
                assert finished(cache) >= before
        left = [p for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or [])]
        timed(ENCODE, place / "one", cache)
    return {
        "kills": times,
        "shards": finished(cache),
        "same_bytes": hashes(cache) == hashes(undisturbed),
        "most_shards_begun_at_a_kill": max(lost),
        "processes_left": len(left),
    }


def finished(cache: Path) -> int:
    return sum(1 for _ in cache.glob("shards/*/*/??????.json"))


def hashes(cache: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in cache.glob("shards/*/*/*")
        if path.suffix in (".bin", ".npy")
    }


HUGE = """
import sys, time, resource, json
from pathlib import Path
import numpy as np
from gptpl.data.pretraining.datamodule import TextDataModule, TokenSequences
from gptpl.data.pretraining.shards import encode_documents
from gptpl.data.sampler import EpochSampler
from gptpl.data.sources import TextFiles
from gptpl.tokenizers import GPT2Tokenizer
from itertools import islice

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
text, cache = TextFiles(sys.argv[1], pattern=None), Path(sys.argv[2])
found = encode_documents(text, GPT2Tokenizer(), val_tokens=2_000_000, cache_dir=cache)
sequences = TokenSequences(found.train, max_length=1024, stride=1024)
sampler = EpochSampler(len(sequences), batch_size=8, seed=123, computed=True)
order = islice(iter(sampler), 8)
sequences.__getitems__(list(order))
seconds = time.perf_counter() - started
order = np.array(list(islice(iter(sampler), 200_000)))
counts = np.histogram(order, np.linspace(0, len(sequences), 1001))[0]
expected = len(order) / 1000
chi = float(((counts - expected) ** 2 / expected).sum())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"tokens": len(found.train), "sequences": len(sequences), "seconds": round(seconds, 2),
    "more_memory_mb": round((peak - before) / 1000), "chi_square_of_999": round(chi)}))
"""


def opening(place: Path) -> dict[str, Any]:
    """A later start of the corpus of many files, and a corpus of 1 TB, which sparse files stand for."""
    cache = place / "cache"
    for kind in ("one", "many"):
        if not (cache / kind).is_dir():
            timed(ENCODE, place / kind, cache / kind)
    starts = {
        kind: min(timed(ENCODE, place / kind, cache / kind)["seconds"] for _ in range(3))
        for kind in ("one", "many")
    }
    entry = next((cache / "one/shards").glob("*/*/manifest.json")).parent
    kept = (entry / "manifest.json").read_text()
    manifest = json.loads(kept)
    each, shards = 100_000_000, 2500
    names = [f"sparse{number:06}.bin" for number in range(shards)]
    try:
        for name in names:
            with (entry / name).open("wb") as file:
                file.truncate(2 * each)
        manifest["shards"] = dict.fromkeys(names, each)
        manifest["stats"]["train_tokens"] = each * shards
        (entry / "manifest.json").write_text(json.dumps(manifest))
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "program.py")
            script.write_text(HUGE)
            command = [sys.executable, str(script), str(place / "one"), str(cache / "one")]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finally:
        (entry / "manifest.json").write_text(kept)
        for name in names:
            (entry / name).unlink(missing_ok=True)
    return {"later_start_seconds": starts, "one_terabyte": json.loads(out)}


def loader(place: Path) -> dict[str, Any]:
    """Milliseconds to prepare a batch, in the training process, of the shapes of two models."""
    from gptpl.data.pretraining.datamodule import TextDataModule
    from gptpl.data.pretraining.mixture import MixtureDataModule
    from gptpl.data.sources import TextFiles
    from gptpl.tokenizers import GPT2Tokenizer

    found: dict[str, Any] = {}
    for name, B, T in (("124M, 8 x 1024", 8, 1024), ("124M, 2 x 256", 2, 256), ("tiny, 8 x 64", 8, 64)):
        shared: dict[str, Any] = {
            "tokenizer": GPT2Tokenizer(), "max_length": T, "batch_size": B,
            "cache_dir": place / "cache/loader",
        }  # fmt: skip
        lines = {"corpus": TextFiles(place / "lines", pattern=None), "split": "documents"}
        of_mixture = {
            "many": {"path": place / "many", "weight": 1},
            "lines": {"path": place / "lines", "weight": 2},
        }
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "concat": (TextDataModule, lines),
            "best_fit": (TextDataModule, lines | {"packing": "best_fit"}),
            "mixture": (MixtureDataModule, {"sources": of_mixture}),
        }
        for kind, (make, settings) in kinds.items():
            data = make(**shared, **settings)
            data.load()
            started = time.perf_counter()
            data.setup()
            seconds = time.perf_counter() - started
            batches, taken = iter(data.train_dataloader()), []
            for _ in range(500):
                started = time.perf_counter()
                next(batches)
                taken.append(1000 * (time.perf_counter() - started))
            found[f"{name}, {kind}"] = {
                "median_ms": round(statistics.median(taken), 3),
                "p99_ms": round(np.quantile(taken, 0.99), 3),
            }
            if kind == "best_fit":
                packing: Any = data.examples("train").packing
                found[f"{name}, {kind}"] |= {
                    "packing_seconds": round(seconds, 1),
                    "rows": len(packing),
                    "full": round(packing.tokens / (len(packing) * T), 4),
                    "documents": packing.documents,
                    "longer_than_a_row": packing.cut,
                }
    return found


LEARN = """
import sys, time
import gptpl

started = time.perf_counter()
made = gptpl.train_tokenizer("data=corpus", "data.path=" + sys.argv[1], "tokenizer.vocab_size=" + sys.argv[3],
    "tokenizer.sample_bytes=" + sys.argv[4], "tokenizer.output=" + sys.argv[2] + "/tokenizer.json")
made.tokenizer.save(sys.argv[2] + "/tokenizer.json")
print(made.tokenizer.vocab_size, time.perf_counter() - started)
"""


def tokenizers(place: Path) -> dict[str, Any]:
    """Learn vocabularies from parts of the text; of each tokenizer, bytes in a token and speed on 20 MB."""
    from gptpl.tokenizers import FileTokenizer, GPT2Tokenizer, Tokenizer
    from gptpl.tokenizers.hugging_face import write_tokenizer

    learning: dict[str, Any] = {}
    made: dict[str, Tokenizer] = {"gpt2, tiktoken": GPT2Tokenizer()}
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(GPT2Tokenizer(), Path(folder), context_length=1024)
        made["gpt2, as a tokenizer.json"] = FileTokenizer(folder)
    for vocabulary, megabytes in ((8192, 100), (8192, 500), (32768, 500)):
        with tempfile.TemporaryDirectory() as folder:
            name = f"{vocabulary} tokens of {megabytes} MB"
            learning[name] = timed(LEARN, place / "lines", folder, vocabulary, megabytes * 1_000_000)
            made[name] = FileTokenizer(Path(folder))
    with (place / "one/all.txt").open(encoding="utf-8") as file:
        text = file.read(20_000_000)
    size, table = len(text.encode()), {}
    for name, tokenizer in made.items():
        started = time.perf_counter()
        count = sum(len(tokenizer.encode(text[n : n + (1 << 20)])) for n in range(0, len(text), 1 << 20))
        seconds = time.perf_counter() - started
        table[name] = {
            "vocabulary": tokenizer.vocab_size,
            "bytes_a_token": round(size / count, 3),
            "mb_per_second": round(size / seconds / 1e6, 1),
        }
    return {"learning": learning, "on_20_mb": table}


def extremes(place: Path) -> dict[str, Any]:
    """A document of a gigabyte, beside small ones, and ten million documents of ten bytes."""
    found = {}
    with tempfile.TemporaryDirectory(dir=place) as folder:
        one = Path(folder, "one")
        one.mkdir()
        with (place / "one/all.txt").open("rb") as text, (one / "large.txt").open("wb") as large:
            for _ in range(1000):
                large.write(text.read(1_000_000))
        for number in range(100):
            (one / f"{number}.txt").write_text(f"A small document, number {number}.", encoding="utf-8")
        found["one of 1 GB, 100 small ones"] = timed(ENCODE, one, Path(folder, "cache/one"))
        many = Path(folder, "many")
        many.mkdir()
        with (many / "all.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(f'{{"text": "{number:010}"}}\n' for number in range(10_000_000))
        found["10,000,000 of 10 bytes"] = timed(ENCODE, many, Path(folder, "cache/many"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--text", type=Path, default=Path(sys.prefix), help="default: this environment")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir(), "data_pipeline"), help="for texts and tokens"
    )
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    output = HERE / "result.json"
    record = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    place = options.work / str(options.megabytes)
    if not place.is_dir():
        write_corpora(options.text, place, options.megabytes * 1_000_000)
    run = {
        "speed": lambda: speed(place, options.megabytes, options.rounds),
        "kills": lambda: kills(place, options.kills),
        "opening": lambda: opening(place),
        "loader": lambda: loader(place),
        "tokenizers": lambda: tokenizers(place),
        "extremes": lambda: extremes(place),
    }
    for part in options.parts:
        record[part] = run[part]()
        print(json.dumps({part: record[part]}, indent=2))
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
