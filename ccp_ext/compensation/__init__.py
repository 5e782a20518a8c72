"""Repair of a pruned model without training.

:func:`fold_means` puts the means of what was removed into the next layer's bias; :func:`refit`
solves each layer behind a cut anew by least squares, the constant included;
:func:`refit_modules` fits all layers of a module together, after a refit; and
:func:`reestimate_batchnorm` measures the BatchNorm statistics again, after either of them.
"""

from ccp_ext.compensation.batchnorm import reestimate_batchnorm
from ccp_ext.compensation.folding import fold_means
from ccp_ext.compensation.modules import refit_modules
from ccp_ext.compensation.refitting import LAYERS, MEMORY, Refitted, refit

__all__ = [
    "LAYERS",
    "MEMORY",
    "Refitted",
    "fold_means",
    "reestimate_batchnorm",
    "refit",
    "refit_modules",
]
