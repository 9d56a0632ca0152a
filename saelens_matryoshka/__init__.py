"""Matryoshka SAEs and Matryoshka transcoders for SAELens.

Importing this package registers the architectures "matryoshka_sae", "matryoshka_transcoder" and
"matryoshka_skip_transcoder" in SAELens; its stock runner then trains them.
"""

import sys
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saelens_matryoshka.api import *  # noqa: F403

__version__ = "0.1.0"


def load() -> None:
    """Import all there is, and register the architectures: what importing this package does.

    Only the command line does it later. SAELens and what it stands on take seconds to import, and `--help`
    needs none of it.
    """
    from saelens_matryoshka import api

    for name in ("__all__", *api.__all__):
        globals().setdefault(name, getattr(api, name))


def _is_command_line() -> bool:
    """Whether Python was started as `saelens-matryoshka` or `python -m saelens_matryoshka`."""
    if sys.argv[:1] == ["-m"]:  # as long as Python is looking for the module
        return ("-m", __name__) in pairwise(sys.orig_argv)
    script = sys.argv[0] if sys.argv else ""  # inherited by processes that multiprocessing spawns
    return script in sys.orig_argv and PurePath(script).stem == "saelens-matryoshka"


if not _is_command_line():
    load()
