"""What the data is, in a few lines for the person who is about to train on it."""

from gptpl.data.encoded_corpus import CorpusStats, EncodedCorpus
from gptpl.data.windows import TokenWindows

# Hoffmann et al. 2022 (Chinchilla): at a given compute, loss is lowest near 20 tokens a parameter.
TOKENS_PER_PARAMETER = 20
MANY_DUPLICATES = 0.01


def data_report(
    encoded: EncodedCorpus,
    *,
    name: str,
    max_length: int,
    stride: int,
    batch_size: int,
    parameters: int,
) -> list[str]:
    """Return the lines of the report: a table of both splits, then what the figures mean.

    `batch_size` is the number of windows in a training batch, over all devices; `parameters` those of the
    model. Raises InputError when a split is too short for one window of `max_length` tokens.
    """
    stats = encoded.stats
    train = len(TokenWindows(encoded.train, max_length=max_length, stride=stride, split="training"))
    val = len(TokenWindows(encoded.val, max_length=max_length, stride=stride, split="validation"))
    rows = [
        ("documents", stats.train_documents, stats.val_documents),
        ("characters", stats.train_characters, stats.val_characters),
        ("tokens", stats.train_tokens, stats.val_tokens),
        (f"windows of {max_length:,} tokens, one every {stride:,}", train, val),
        # training drops the last short batch
        (f"batches of {batch_size:,} windows", train // batch_size, -(-val // batch_size)),
    ]
    title = (
        f"data: {name}, {_counted(stats.documents, 'document')}, "
        f"{encoded.tokenizer.name} tokenizer ({encoded.tokenizer.vocab_size:,} tokens)"
    )
    return [title, *_table(rows), _size_line(stats.train_tokens, parameters), _duplicates_line(stats)]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _table(rows: list[tuple[str, int, int]]) -> list[str]:
    cells = [("", "training", "validation"), *((label, f"{a:,}", f"{b:,}") for label, a, b in rows)]
    first, second, third = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [f"  {label:<{first}}  {a:>{second}}  {b:>{third}}" for label, a, b in cells]


def _size_line(train_tokens: int, parameters: int) -> str:
    """Return the tokens per parameter, turned round where a newcomer would have to count zeros."""
    ratio = train_tokens / parameters
    if ratio < 1:
        figure = f"1 training token for every {parameters / max(1, train_tokens):,.0f} parameters"
    else:
        figure = f"{ratio:,.1f} training tokens for every parameter"
    if ratio < 1:
        meaning = "the model can learn the text by heart, so watch the validation loss"
    elif ratio < TOKENS_PER_PARAMETER:
        meaning = f"about {TOKENS_PER_PARAMETER} use the model's size well"
    else:
        meaning = "enough for this size of model"
    return f"  {figure}: {meaning}"


def _duplicates_line(stats: CorpusStats) -> str:
    """Return how much of the validation text training has seen, and whether that matters."""
    figure = (
        f"{stats.duplicate_blocks:,} of {stats.compared_blocks:,} blocks of 32 validation tokens "
        "also stand word for word in the training text"
    )
    if not stats.compared_blocks:
        return "  the validation text is too short to look for duplicates of the training text"
    if stats.duplicate_share > MANY_DUPLICATES:
        meaning = "the validation loss is too good by what the model remembers of them"
    else:
        meaning = "the validation loss is a fair test"
    return f"  {figure} ({stats.duplicate_share:.1%}): {meaning}"
