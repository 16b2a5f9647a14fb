"""Training-free token reducers behind one protocol: the baselines every trained system has to beat.

None needs attention maps or a class token, so all work after any encoder, with any attention kernel.

    base.py       TokenReducer, the protocol; ItemReducer, what the reducers here share
    selection.py  Uniform, RandomSubset, Prefix, NormPruning: keep some tokens as they are
    pooling.py    AveragePooling, Stacking: join neighbours in windows
    merging.py    BipartiteMerging: join similar tokens (ToMe)
"""

from tokenthrift.reducers.base import Item, ItemReducer, TokenReducer
from tokenthrift.reducers.merging import BipartiteMerging
from tokenthrift.reducers.pooling import AveragePooling, Stacking
from tokenthrift.reducers.selection import NormPruning, Prefix, RandomSubset, Uniform

__all__ = [
    "AveragePooling",
    "BipartiteMerging",
    "Item",
    "ItemReducer",
    "NormPruning",
    "Prefix",
    "RandomSubset",
    "Stacking",
    "TokenReducer",
    "Uniform",
]
