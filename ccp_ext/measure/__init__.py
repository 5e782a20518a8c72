"""What a model costs, measured by running it."""

from ccp_ext.counting import as_arguments, macs, parameters
from ccp_ext.measure.timing import Latency, latency
from ccp_ext.measure.usage import Resources, memory_kind, resources
from ccp_ext.measure.widths import latency_table

__all__ = [
    "Latency",
    "Resources",
    "as_arguments",
    "latency",
    "latency_table",
    "macs",
    "memory_kind",
    "parameters",
    "resources",
]
