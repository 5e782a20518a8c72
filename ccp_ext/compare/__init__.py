"""Criteria side by side at equal cost: the same images, budgets, repairs and test for each.

A row is one model: an arm's choice of channels at one budget, with the images and random numbers of
one seed, after one repair. Where a repair ends in fine-tuning, the unpruned model has the same
schedule, as a control. Rows are kept as they are done, and an interrupted comparison goes on.

The test images in their official order are cut in two (every second one, where they are sorted by
class): whatever is chosen by looking at results
(an arm, a repair, an option) is to be chosen on the first half, "selection"; the second, "report",
is for the figures that are then quoted.
"""

from ccp_ext.compare.running import compare
from ccp_ext.compare.settings import Arm, CompareSettings

__all__ = ["Arm", "CompareSettings", "compare"]
