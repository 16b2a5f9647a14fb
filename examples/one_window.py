"""One context window over pictures, a film and a recording: the tokens that each gets, before anything runs.

python examples/one_window.py 1024
"""

import sys
from typing import Any

from tokenthrift.budget import ItemSize
from tokenthrift.models import find
from tokenthrift.reducers import BipartiteMerging, TemporalMerging
from tokenthrift.window import Window, WindowItem

total = int(sys.argv[1])
karl: Any = find("model_cards/karl-tiny-64").model  # without weights: a plan needs none
speech: Any = find("model_cards/mtsk-tiny-en").model
items = [
    WindowItem.text("the question", 40),
    WindowItem.of(BipartiteMerging(), 729, kind="image", name="screenshot", weight=2.0),
    WindowItem.of(TemporalMerging(), ItemSize(native=6272, frames=32, height=14, width=14), kind="video", name="film"),
    WindowItem.of(karl, ItemSize(height=64, width=64), kind="image", name="icon"),
    WindowItem.of(speech, ItemSize(seconds=12.0), kind="audio", name="what was said"),
]
for split in ("demand", "equal"):
    plan = Window(total, items, split=split, reserve=64).plan()  # 64 are kept for the answer
    print(f"split by {split}: {plan.used} of {plan.native} native tokens, window of {total}")
    for part in plan.items:
        print(f"  {part.item.name:<14}{part.usage.used:>6} of {part.usage.native:<6}  run it with {part.budget}")
