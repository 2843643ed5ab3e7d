"""A corpus as tokens: the two splits, the tokenizer that made them, and what was counted on the way."""

from dataclasses import dataclass

from gptpl.data.token_file import Tokens
from gptpl.data.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CorpusStats:
    """Counts of a corpus and of its two splits.

    A document that the cut falls into counts in both splits. Characters are those of the documents, tokens
    include the end-of-text tokens between documents. Of `compared_blocks` blocks of 32 validation tokens,
    `duplicate_blocks` stand word for word in the training split.
    """

    documents: int
    train_documents: int
    val_documents: int
    train_characters: int
    val_characters: int
    train_tokens: int
    val_tokens: int
    duplicate_blocks: int
    compared_blocks: int
    content_sha256: str

    @property
    def duplicate_share(self) -> float:
        """The part of the validation blocks that training has seen, 0.0 to 1.0."""
        return self.duplicate_blocks / self.compared_blocks if self.compared_blocks else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedCorpus:
    """Both splits as 1-D token arrays, often memory-mapped: uint16, uint32 for more than 65,536 tokens."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    stats: CorpusStats
