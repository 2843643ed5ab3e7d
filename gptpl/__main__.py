"""`python -m gptpl`: the same as the command `gptpl`."""

import sys

from gptpl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
