"""A source of random numbers for every row, so that no row's text depends on its neighbours."""

import torch


def row_generators(
    generator: torch.Generator | None, *, prompts: int, samples: int, device: torch.device
) -> list[torch.Generator]:
    """One generator a row, row = prompt * samples + sample.

    The k-th samples of all prompts start in the same state: alone or in company, a prompt's k-th sample is
    the same. Of the first samples, the first row has `generator` itself, which so moves on, and the others
    have copies of it; the later samples' are seeded by numbers drawn from a copy. None: a generator seeded by
    torch's global one, so that `torch.manual_seed` decides.
    """
    if generator is None:
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
    source = _copy(generator)
    seeds = [int(torch.randint(2**62, (), generator=source, device=device)) for _ in range(samples - 1)]
    rows: list[torch.Generator] = []
    for _ in range(prompts):
        rows.append(_copy(generator))
        rows += [torch.Generator(device).manual_seed(seed) for seed in seeds]
    rows[0] = generator
    return rows


def _copy(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())
