"""`python -m eightfold` is the command `eightfold`."""

import sys

from eightfold.cli import main

if __name__ == "__main__":
    sys.exit(main())
