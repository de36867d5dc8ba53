"""Terms of the objective beside the ELBO, one file each, the formula on top."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Term, build_terms, term_names
from .context_prediction import ContextPrediction
from .edit_consistency import EditConsistency
from .free_invariance import FreeInvariance
from .sparsity import L2, GroupLasso


__all__ = [
    "L2",
    "ContextPrediction",
    "EditConsistency",
    "FreeInvariance",
    "GroupLasso",
    "Term",
    "build_terms",
    "term_names",
]

for _module in iter_modules(__path__):  # a new file here is all that a new term needs
    import_module(f".{_module.name}", __name__)
