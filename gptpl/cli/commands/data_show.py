"""Show what a text holds before training on it, in the terminal and as a web page.

examples:
  gptpl data show data=text_file data.path=my.txt                # a book; writes data.html
  gptpl data show data=corpus data.path=books sequences=3        # also the first sequences of training
  gptpl data show data=corpus data.path=books sample_bytes=null  # all of it, however large

Takes the settings of gptpl train. Shows documents, tokens, lengths, scripts, the most frequent tokens,
duplicates, and odd documents: empty, enormous, binary, not UTF-8, damaged, not JSON. What cannot be read is
listed and left out. The page needs no network.
"""

from gptpl.cli.arguments import Arguments, checked_output, configured
from gptpl.runs.data_report import data_report


@configured("data show")
def run(given: Arguments) -> None:
    """Prints the report, writes the page."""
    cfg = given.config
    page = None if cfg.output is None else checked_output("output", cfg.output, suffix=".html")
    report = data_report(cfg, sequences=cfg.sequences, sample_bytes=cfg.sample_bytes)
    print("\n".join(report.lines()))
    if page is not None:
        report.write(page)
        print(f"\npage  {page}")
