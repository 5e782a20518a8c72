"""The channels of all groups chosen together, with the curvature between the groups.

With the rows Q_g [M, C_g] of every group side by side, Q = [Q_1 ... Q_G], the whole network has the
matrix F = Q'Q / N. Its diagonal blocks are the groups' S; the others say what a removal here costs
more, or less, because of those there. For the mask m of the removed channels of all groups

    cost(m) = ||Qm||^2 / (2N) - u'm.

F is never stored: the descent needs Qm [M], the gradient F m - u [C], and the rows of F that belong
to one group at a time.
"""

from ccp_ext.joint.bound import lower_bound
from ccp_ext.joint.descent import Refinement, refine
from ccp_ext.joint.problem import JointCost

__all__ = ["JointCost", "Refinement", "lower_bound", "refine"]
