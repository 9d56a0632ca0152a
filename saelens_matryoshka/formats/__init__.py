"""What other tools keep their SAEs and transcoders in, read and written.

`converter` reads through SAELens's own loading functions; `import_models` and `export_models` turn folders of
one kind into folders of the other. A format is one module: pure functions between its state dict and a
`SparseCoder`, and the few lines that find its files.
"""

from saelens_matryoshka.formats.coder import SparseCoder, build, from_saelens, to_saelens
from saelens_matryoshka.formats.files import FormatError
from saelens_matryoshka.formats.registry import FORMATS, Converter, Unstated, converter, load
from saelens_matryoshka.formats.sources import Folder, HubRepository, Source, open_source

__all__ = [
    "FORMATS",
    "Converter",
    "Folder",
    "FormatError",
    "HubRepository",
    "Source",
    "SparseCoder",
    "Unstated",
    "build",
    "converter",
    "from_saelens",
    "load",
    "open_source",
    "to_saelens",
]
