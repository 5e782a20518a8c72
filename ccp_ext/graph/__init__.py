"""Which channels of a model live and die together.

``channels`` holds the data types, ``tracing`` makes a graph of a model, ``rules`` knows the
operators, ``propagate`` keeps the positions of the channels, ``groups`` puts them together,
``calls`` relates operators to modules, ``probe`` runs the model on fake tensors, ``addends`` finds
what the outputs of layers are added to, and ``feeders`` which convolution feeds another one.
"""

from __future__ import annotations

from ccp_ext.graph.addends import addends
from ccp_ext.graph.channels import ChannelGraph, Fixed, Group, InputSpec, Layer, Slice, Tap
from ccp_ext.graph.feeders import Feeder, feeders
from ccp_ext.graph.tracing import trace

__all__ = [
    "ChannelGraph",
    "Feeder",
    "Fixed",
    "Group",
    "InputSpec",
    "Layer",
    "Slice",
    "Tap",
    "addends",
    "feeders",
    "trace",
]
