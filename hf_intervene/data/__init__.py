"""Images from several contexts (`ContextImages`), and schedules that draw batches from them.

The data sets are `quad` (drawn), `ident3d` (rendered), `mnist` (real digits), `avatars` (faces) and
your own images (`folder`).
"""

from .avatars import load_avatars
from .digits import load_digits
from .folder import load_contexts
from .ident3d import load_ident3d
from .images import ContextImages
from .mnist import load_mnist
from .quad import load_quad
from .schedule import ContextSchedule, shard


__all__ = [
    "ContextImages",
    "ContextSchedule",
    "load_avatars",
    "load_contexts",
    "load_digits",
    "load_ident3d",
    "load_mnist",
    "load_quad",
    "shard",
]
