"""Training-free token reducers behind one protocol: the baselines every trained system has to beat.

None needs attention maps or a class token, so all work after any encoder, with any attention kernel.

    base.py       TokenReducer, the protocol; ItemReducer, what the reducers here share
    selection.py  Uniform, RandomSubset, Prefix, NormPruning: keep some tokens as they are
    pooling.py    AveragePooling, Stacking: join neighbors in windows
    merging.py    BipartiteMerging: join similar tokens (ToMe)
    diversity.py  MaxMinDiversity: keep tokens that are unlike each other (DivPrune)
    query.py      ConditionalDiversity, QuerySelection: read the question (CDPruner, SparseVLM)
    temporal.py   TemporalMerging: join what does not change from frame to frame (EVS, DyCoke)

`REDUCERS` is the table of those that need no settings, by the names that prompts and benchmarks use.
"""

from collections.abc import Callable
from typing import Final

from tokenthrift.reducers.base import Item, ItemReducer, TokenReducer
from tokenthrift.reducers.diversity import MaxMinDiversity
from tokenthrift.reducers.merging import BipartiteMerging
from tokenthrift.reducers.pooling import AveragePooling, Stacking
from tokenthrift.reducers.query import ConditionalDiversity, QuerySelection
from tokenthrift.reducers.selection import NormPruning, Prefix, RandomSubset, Uniform
from tokenthrift.reducers.temporal import TemporalMerging

__all__ = [
    "REDUCERS",
    "AveragePooling",
    "BipartiteMerging",
    "ConditionalDiversity",
    "Item",
    "ItemReducer",
    "MaxMinDiversity",
    "NormPruning",
    "Prefix",
    "QuerySelection",
    "RandomSubset",
    "Stacking",
    "TemporalMerging",
    "TokenReducer",
    "Uniform",
]

REDUCERS: Final[dict[str, Callable[[], ItemReducer]]] = {
    "uniform": Uniform,
    "random": RandomSubset,
    "prefix": Prefix,
    "norm-pruning": NormPruning,
    "average-pooling": AveragePooling,
    "merging": BipartiteMerging,
    "max-min-diversity": MaxMinDiversity,
    "conditional-diversity": ConditionalDiversity,
    "query-selection": QuerySelection,
    "temporal-merging": TemporalMerging,
}
