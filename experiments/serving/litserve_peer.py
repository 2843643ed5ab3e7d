"""LitServe around a model of load.py: requests that come together are one batch, each token is sent at once.

python experiments/serving/litserve_peer.py transformers FOLDER PORT   # or gptpl: its decoding in LitServe
"""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import litserve
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

import gptpl
from gptpl.generation import Decoding, SamplingRules
from gptpl.model import CachedGPT

ROWS = 8


class Writer(litserve.LitAPI):
    """Greedy texts of full length."""

    def __init__(self, engine: str, folder: str) -> None:
        super().__init__(max_batch_size=ROWS, batch_timeout=0.02, stream=True)
        self.engine, self.folder = engine, folder

    def setup(self, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if self.engine == "gptpl":
            self.model: Any = CachedGPT(gptpl.load(self.folder, device="cpu").net, rows=ROWS)
        else:
            self.model = GPT2LMHeadModel.from_pretrained(self.folder).eval()

    def decode_request(self, request: dict[str, Any]) -> tuple[list[int], int]:
        return self.tokenizer(request["prompt"])["input_ids"], request["max_tokens"]

    def batch(self, inputs: list[tuple[list[int], int]]) -> list[tuple[list[int], int]]:
        return inputs

    def predict(self, inputs: list[tuple[list[int], int]]) -> Iterator[list[str]]:
        prompts, lengths = zip(*inputs, strict=True)
        steps = self.decoded if self.engine == "gptpl" else self.continued
        for number, tokens in enumerate(steps(prompts, max(lengths))):
            yield [
                self.tokenizer.decode([token]) if number < length else ""
                for token, length in zip(tokens, lengths, strict=True)
            ]

    def unbatch(self, output: Iterable[list[str]]) -> Iterator[list[str]]:
        yield from output

    def encode_response(self, output: Iterable[list[str]]) -> Any:  # FastAPI reads this type
        for texts in output:
            yield [f"data: {json.dumps({'choices': [{'text': text}]})}\n\n" for text in texts]

    def decoded(self, prompts: list[list[int]], length: int) -> Iterator[list[int]]:
        """By gptpl's own decoding, which a batch runs through together."""
        decoding = Decoding(self.model, prompts, rules=SamplingRules(), max_new_tokens=length)
        while step := decoding.step():
            yield step.tokens

    def continued(self, prompts: list[list[int]], length: int) -> Iterator[list[int]]:
        """By transformers' model with its cache, prompts padded on the left."""
        T = max(map(len, prompts))
        ids = torch.tensor([[0] * (T - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = None
        with torch.inference_mode():
            for _ in range(length):
                out = self.model(
                    ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                positions = positions[:, -1:] + 1
                yield ids[:, 0].tolist()


if __name__ == "__main__":
    engine, folder, port = sys.argv[1:]
    server = litserve.LitServer(Writer(engine, folder), accelerator="cpu", timeout=600)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, num_api_servers=1)
