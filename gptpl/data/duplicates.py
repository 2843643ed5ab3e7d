"""How much of the validation text also stands in the training text.

A model that has read the validation text during training is not tested by it. Both splits are compared by a
rolling polynomial hash modulo 2^64, so that the work is linear in the tokens and the memory bounded.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 32
CHUNK_TOKENS = 1 << 20  # training tokens hashed at a time: about 8 MB an array

# Odd, so that a multiplication loses no bit modulo 2^64.
_BASE = 0x9E3779B97F4A7C15
_SPREAD = 0xBF58476D1CE4E5B9
_MODULUS_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class DuplicateBlocks:
    """Of `blocks` validation blocks of 32 tokens, `duplicated` stand word for word in the training split."""

    duplicated: int
    blocks: int

    @property
    def share(self) -> float:
        """The duplicated part of all blocks, 0.0 to 1.0; 0.0 when there is no block."""
        return self.duplicated / self.blocks if self.blocks else 0.0


def count_duplicates(
    train: NDArray[np.unsignedinteger],
    val: NDArray[np.unsignedinteger],
    *,
    block_tokens: int = BLOCK_TOKENS,
    chunk_tokens: int = CHUNK_TOKENS,
) -> DuplicateBlocks:
    """Count the non-overlapping validation blocks that occur verbatim, at any offset, in the training tokens.

    `block_tokens` must be a power of two. A last, shorter block is not counted, nor is anything found in a
    training split shorter than a block. Two different blocks share a hash with a chance of about 2^-64.
    """
    if block_tokens < 1 or block_tokens & (block_tokens - 1):
        raise ValueError(f"block_tokens={block_tokens} is not a power of two")
    hashes, inverse = np.unique(_block_hashes(val, block_tokens), return_inverse=True)
    if not len(hashes):
        return DuplicateBlocks(duplicated=0, blocks=0)
    # Most training positions match nothing: a table of the top bits dismisses them without a binary search.
    shift = np.uint64(64 - min(26, len(hashes).bit_length() + 5))
    table = np.zeros(1 << (64 - int(shift)), dtype=bool)
    table[hashes >> shift] = True
    seen = np.zeros(len(hashes), dtype=bool)
    for start in range(0, max(0, len(train) - block_tokens + 1), chunk_tokens):
        rolled = _rolling_hashes(train[start : start + chunk_tokens + block_tokens - 1], block_tokens)
        candidates = rolled[table[rolled >> shift]]
        places = np.searchsorted(hashes, candidates).clip(max=len(hashes) - 1)
        seen[places[hashes[places] == candidates]] = True
    return DuplicateBlocks(duplicated=int(seen[inverse].sum()), blocks=len(inverse))


def _token_hashes(tokens: NDArray[np.unsignedinteger]) -> NDArray[np.uint64]:
    return tokens.astype(np.uint64) * np.uint64(_SPREAD)


def _block_hashes(tokens: NDArray[np.unsignedinteger], size: int) -> NDArray[np.uint64]:
    """Hash every non-overlapping block, by Horner's rule: h = t0 b^(size-1) + ... + t(size-1)."""
    blocks = np.asarray(tokens[: len(tokens) // size * size]).reshape(-1, size)
    hashes = np.zeros(len(blocks), dtype=np.uint64)
    for column in range(size):
        hashes = hashes * np.uint64(_BASE) + _token_hashes(blocks[:, column])
    return hashes


def _rolling_hashes(tokens: NDArray[np.unsignedinteger], size: int) -> NDArray[np.uint64]:
    """Hash the `size` tokens from every position on, doubling: h_2k[i] = h_k[i] b^k + h_k[i + k]."""
    hashes = _token_hashes(np.asarray(tokens))
    power, width = _BASE, 1
    while width < size:
        hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
        power, width = power * power & _MODULUS_MASK, 2 * width
    return hashes
