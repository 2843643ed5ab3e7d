"""Types of the group `judge`, with the default prompts; the other schemas are in `gptpl.cli.schema`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

RUBRIC = """\
The best score is for an answer that is right, does all that is asked, and nothing else; half of it for one
that is partly right; the lowest for one that is wrong, empty, off the subject or unreadable. An answer may be
worded otherwise than the reference. Length is no merit."""

_TASK = """\
Instruction:
{{ instruction }}

{% if input %}
Input:
{{ input }}

{% endif %}
Correct answer:
{{ output }}

"""

PROMPT = f"""\
Score how well a model's answer follows an instruction.

{_TASK}\
Model's answer:
{{{{ model_response }}}}

{{{{ rubric }}}}

Reply with one line and nothing else; N is a whole number from {{{{ min_score }}}} to {{{{ max_score }}}}:
Score: N"""

REMINDER = """\
Reply with one line and nothing else; N is a whole number from {{ min_score }} to {{ max_score }}:
Score: N"""

COMPARISON_PROMPT = f"""\
Which of two answers follows an instruction better? Their order has no meaning.

{_TASK}\
Answer A:
{{{{ answer_a }}}}

Answer B:
{{{{ answer_b }}}}

{{{{ rubric }}}}

Reply with one of these lines and nothing else:
Winner: A
Winner: B
Winner: tie"""

COMPARISON_REMINDER = """\
Reply with one of these lines and nothing else:
Winner: A
Winner: B
Winner: tie"""


@dataclass(kw_only=True)
class NoJudgeConf:
    """`gptpl.judging.settings.NoJudge`."""

    _target_: str = "gptpl.judging.settings.NoJudge"


@dataclass(kw_only=True)
class JudgeModelConf:
    """`gptpl.judging.settings.JudgeModel`; any key may be set below `options`."""

    _target_: str = "gptpl.judging.settings.JudgeModel"
    protocol: str = MISSING
    address: str = MISSING
    model: str = MISSING
    api_key_env: str | None = None
    temperature: float | None = 0.0
    seed: int | None = 123
    num_ctx: int | None = None
    max_tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    rubric: str = RUBRIC
    prompt: str = PROMPT
    reminder: str = REMINDER
    comparison_prompt: str = COMPARISON_PROMPT
    comparison_reminder: str = COMPARISON_REMINDER
    min_score: float = 0
    max_score: float = 100
    asks: int = 3
    timeout_seconds: float = 120
    retries: int = 4
    backoff_seconds: float = 1
    max_wait_seconds: float = 120
    max_concurrent: int = MISSING


@dataclass(kw_only=True)
class JudgeConf:
    """Root of `gptpl judge`."""

    responses: str = MISSING
    compare: str | None = MISSING
    output: str | None = MISSING
    both_orders: bool = MISSING
    seed: int = MISSING
    bootstrap_samples: int = MISSING
    markers: list[str] = MISSING
    judge: Any = MISSING
