"""`python benchmarks/kimi_linear_135m --help`: the figures of the model card, from their beginning."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the package's parent: it is run as a folder

from kimi_linear_135m.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
