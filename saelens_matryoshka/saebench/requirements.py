"""Whether SAEBench is installed, and how to install it beside this package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

VERSION = "0.6.0"
"""The release of sae-bench whose insides `patches` knows."""

COMMANDS = f"""\
  pip install --editable ".[saebench]"
  pip install --no-deps sae-bench=={VERSION} "sae-probes>=0.4,<0.5" "xgboost>=3.0.2,<4\""""
"""What installs SAEBench beside this package.

The second command takes `--no-deps` because sae-bench pins datasets<4 and numpy<2 and asks for
torchvision, none of which its evals need, sae-probes pins pyarrow<26, and xgboost brings a CUDA library
that nothing here uses. What they do need is the extra `saebench`.
"""


_MODULES = (
    "sae_bench",
    "sae_probes",
    "xgboost",
    "beartype",
    "jaxtyping",
    "einops",
    "pandas",
    "sklearn",
    "tabulate",
    "zstandard",
    "openai",
)


def require_sae_bench() -> None:
    """Check that SAEBench can be imported, without importing it.

    Raises:
        ImportError: It is not installed, or another version of it is; with the commands that mend it.
    """
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"saebench: {', '.join(missing)} cannot be imported. SAEBench's pins (datasets<4, numpy<2) "
            "are stricter than its code, so install it with these two commands, in the folder of this "
            f"package:\n{COMMANDS}"
        )
    if (found := installed_version()) != VERSION:
        raise ImportError(
            f"saebench works with sae-bench {VERSION}, but {found} is installed. Install the one it knows:\n"
            f"  pip install --no-deps sae-bench=={VERSION}"
        )


def installed_version() -> str | None:
    """Version of the sae-bench that is installed."""
    try:
        return version("sae-bench")
    except PackageNotFoundError:
        return None
