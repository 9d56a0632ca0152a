"""Training in many processes, applied from outside: see `docs/parallel.md`.

`job` joins the processes that torchrun starts, `data` divides the text, `trainer` and `dictionary` change
SAELens's trainer and the weights it trains, `processes` has the collectives.
"""

from saelens_matryoshka.parallel.job import (
    Job,
    LostProcessError,
    Mesh,
    Sharding,
    is_first_process,
    is_torchrun,
    joined,
    mesh_shape,
)

__all__ = [
    "Job",
    "LostProcessError",
    "Mesh",
    "Sharding",
    "is_first_process",
    "is_torchrun",
    "joined",
    "mesh_shape",
]
