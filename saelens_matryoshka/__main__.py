"""`python -m saelens_matryoshka`, or `torchrun --nproc-per-node 8 -m saelens_matryoshka train ...`."""

from __future__ import annotations

import os
import sys

if int(os.environ.get("RANK", "0")) > 0:  # one process of a job shows what is going on
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115

from saelens_matryoshka.cli import main

if __name__ == "__main__":
    main()
