"""Context data: `quad` (simulated), your own images (`folder`), both as resident `ContextImages`; and the context schedules."""

from .folder import load_contexts
from .images import ContextImages
from .quad import load_quad
from .schedule import ContextSchedule, shard


__all__ = ["ContextImages", "ContextSchedule", "load_contexts", "load_quad", "shard"]
