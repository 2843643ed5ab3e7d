"""`gptpl inspect`: how surprised a model is by each token of a text, as a web page."""

import logging
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from gptpl.cli.console import RunLog
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.cli.model_input import given_text, loaded_checkpoint, piped_text
from gptpl.data.tokenizers import Tokenizer
from gptpl.errors import InputError
from gptpl.files.whole import write_atomically
from gptpl.generation.surprisal import surprisals
from gptpl.generation.surprisal_page import surprisal_page
from gptpl.generation.text_stream import TextStream

log = logging.getLogger(__name__)


def run(arguments: list[str]) -> int:
    """Writes the page, prints loss, perplexity and where it is; returns the exit status."""
    run_under_hydra("inspect", arguments, _inspect)
    return 0


def _inspect(cfg: DictConfig) -> None:
    with RunLog():
        output = _checked_output(cfg.output)
        text = given_text("???" if OmegaConf.is_missing(cfg, "text") else cfg.text, cfg.text_file, key="text")
        text = piped_text("text") if text is None else text
        if not text:
            given = "no text is given" if text is None else f"the text{_origin(cfg)} is empty"
            raise InputError(f"{given}: give text='...', text_file=FILE, or pipe one in")
        loaded = loaded_checkpoint(cfg)
        tokenizer = loaded.tokenizer
        ids = [int(token) for token in tokenizer.encode(text)]
        if not ids:
            raise InputError(f"text={text!r} holds no token: give at least one word")
        found = surprisals(loaded.net, ids, eot_id=tokenizer.eot_id, alternatives=cfg.alternatives)
        tokens = list(tqdm(found, total=len(ids), unit="token", desc="reading", disable=None))
        page = surprisal_page(
            tokens,
            _texts(tokenizer, ids),
            title="How surprising is this text?",
            facts={"checkpoint": str(loaded.path), "step": f"{loaded.step:,}"},
            token_text=_token_text(tokenizer),
        )
        write_atomically(output, page)
        loss = statistics.fmean(each.surprisal for each in tokens)
        print(f"tokens      {len(tokens):,}")
        print(f"loss        {loss:.4f} nats per token")
        print(f"perplexity  {math.exp(loss):.2f}" if loss < 700 else "perplexity  inf")
        print(f"page        {output}")


def _origin(cfg: DictConfig) -> str:
    return "" if cfg.text_file is None else f" of text_file={cfg.text_file}"


def _texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text; what is left at the end belongs to the last."""
    stream = TextStream(tokenizer, [])
    texts = [stream.push(token) for token in ids]
    texts[-1] += stream.rest()
    return texts


def _token_text(tokenizer: Tokenizer) -> Callable[[int], str]:
    r"""The text of any token id; bytes that are no text on their own, to be told apart, as `\xe2`."""
    vocabulary = list(tokenizer.vocabulary_bytes())

    def text_of(token: int) -> str:
        # A model may have more rows than its tokenizer has tokens.
        return vocabulary[token].decode("utf-8", "backslashreplace") if token < len(vocabulary) else ""

    return text_of


def _checked_output(given: str) -> Path:
    output = Path(given).expanduser()
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"output={given} cannot be written: give a file in a folder that exists")
    return output
