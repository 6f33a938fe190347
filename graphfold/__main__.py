"""`python -m graphfold`."""

import sys

from graphfold.cli import main

if __name__ == "__main__":
    sys.exit(main())
