"""Terms of the objective beside the ELBO, one file each, the formula on top."""

from .base import Term
from .context_prediction import ContextPrediction
from .edit_consistency import EditConsistency
from .free_invariance import FreeInvariance
from .sparsity import L2, GroupLasso


__all__ = ["L2", "ContextPrediction", "EditConsistency", "FreeInvariance", "GroupLasso", "Term"]
