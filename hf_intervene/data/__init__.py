"""Context data: `quad` (simulated), `mnist` (real digits), your own images (`folder`), all as resident `ContextImages`; and the context schedules."""

from .digits import load_digits
from .folder import load_contexts
from .images import ContextImages
from .mnist import load_mnist
from .quad import load_quad
from .schedule import ContextSchedule, shard


__all__ = ["ContextImages", "ContextSchedule", "load_contexts", "load_digits", "load_mnist", "load_quad", "shard"]
