"""Completion of commands, choices and settings in a shell: read from conf/ as text, without torch."""

from collections.abc import Sequence

from gptpl.cli.help import commands, module_of
from gptpl.config.groups import choices, default_choices, known_keys
from gptpl.errors import InputError

SCRIPT = """\
_gptpl() {
    local IFS=$'\\n'
    COMPREPLY=($(gptpl completion words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
    COMPREPLY=("${COMPREPLY[@]#"${COMP_WORDS[COMP_CWORD]%"${COMP_WORDS[COMP_CWORD]##*=}"}"}")
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -F _gptpl gptpl
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def run(arguments: Sequence[str]) -> int:
    """`gptpl completion bash`: prints a script for `eval`; `words`: the candidates for a line's last word."""
    kind = arguments[0] if arguments else ""
    if kind in ("bash", "zsh"):
        print((ZSH if kind == "zsh" else "") + SCRIPT, end="")
    elif kind == "words":
        print("\n".join(candidates(list(arguments[1:]))))
    else:
        raise InputError(f'completion {kind}: choose bash or zsh, as in eval "$(gptpl completion bash)"')
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """What the last of the words may be."""
    word = words[-1] if words else ""
    command = next(
        (name for name in commands() if name.split() == list(words[:-1])[: len(name.split())]), None
    )
    if command is None:
        place = max(0, len(words) - 1)
        begun = [name.split() for name in commands() if name.split()[:place] == list(words[:-1])]
        return sorted({each[place] for each in begun if len(each) > place and each[place].startswith(word)})
    root = module_of(command)
    group, equals, _ = word.partition("=")
    if equals:
        offered = [f"{group}={choice}" for choice in choices(group)]
    else:
        offered = [f"{name}=" for name in dict.fromkeys((*default_choices(root), *known_keys(root)))]
    return sorted(each for each in offered if each.startswith(word))
