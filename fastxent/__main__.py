"""``python -m fastxent`` is the command ``fastxent``."""

import sys

from fastxent.cli import main

if __name__ == "__main__":
    sys.exit(main())
