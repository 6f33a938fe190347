"""`python -m tests.corpus`: the same modules that pytest imports, under the same names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from corpus.campaign import main

if __name__ == "__main__":
    sys.exit(main())
