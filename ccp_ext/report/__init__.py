"""What a run or a comparison says: tables, summaries, and one HTML page."""

from ccp_ext.tables import cell, table

__all__ = ["cell", "table"]
