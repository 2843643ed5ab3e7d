"""JSON from users' files, read strictly."""

import json
from typing import Any, NoReturn

from gptpl.errors import InputError


def parse_json(text: str, place: str) -> Any:
    """Parse a JSON text; `place` names it in messages, such as "data.jsonl, line 3".

    Raises InputError for broken JSON, NaN and Infinity, lone surrogates, numbers of thousands of digits, and
    nesting that is too deep.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
        if "\\u" in text:  # how a surrogate gets in
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not valid JSON ({error}): correct the file") from error
    return value
