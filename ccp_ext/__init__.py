"""Remove whole channels of convolutional networks, chosen by their joint effect on the loss.

The way through: :func:`trace`, :func:`collect`, :func:`make_plan`, :func:`prune`,
:func:`refit`, :mod:`ccp_ext.finetune`, :func:`save`, :func:`load`.
"""

from __future__ import annotations

from ccp_ext import criteria, datasets, finetune, measure, models, ops, reference
from ccp_ext._build import build_info, usable_devices
from ccp_ext.allocation import Allocation, allocate
from ccp_ext.allocation.latency import LatencyTable
from ccp_ext.compensation import fold_means, reestimate_batchnorm, refit, refit_modules
from ccp_ext.cost import Cost
from ccp_ext.errors import InputError
from ccp_ext.evaluation import evaluate
from ccp_ext.graph import ChannelGraph, Tap, trace
from ccp_ext.joint import JointCost, Refinement, refine
from ccp_ext.plan import PruningPlan
from ccp_ext.planning import make_plan
from ccp_ext.selection import Choice, select
from ccp_ext.statistics import Statistics, collect
from ccp_ext.surgery import load, masked, prune, save

__version__ = build_info()["version"]

__all__ = [
    "Allocation",
    "ChannelGraph",
    "Choice",
    "Cost",
    "InputError",
    "JointCost",
    "LatencyTable",
    "PruningPlan",
    "Refinement",
    "Statistics",
    "Tap",
    "allocate",
    "build_info",
    "collect",
    "criteria",
    "datasets",
    "evaluate",
    "finetune",
    "fold_means",
    "load",
    "make_plan",
    "masked",
    "measure",
    "models",
    "ops",
    "prune",
    "reestimate_batchnorm",
    "reference",
    "refine",
    "refit",
    "refit_modules",
    "save",
    "select",
    "trace",
    "usable_devices",
]
