"""Puts a token reducer into a live vision or audio language model of transformers, and takes it out again.

    with attach(model, BipartiteMerging(), "25%") as handle:
        output = model.generate(**inputs)
        print(handle.usage)

FAMILIES lists the models that are tested: any batch size, padding on either side, forward and generate (greedy,
sampling, beams), training, eager and SDPA attention. Any other family raises until `register_family` adds
it, and so does a call of a kind that cannot be shortened.

The seam is the call of the language model inside the model, after the features stand in their placeholders and before
the first layer. There a hook takes the tokens of every item out, reduces them, and hands the layers shorter rows; after
the last layer another hook spreads the result over the native positions again. Everything outside sees native lengths:
`input_ids`, `attention_mask`, `labels`, logits and what `generate` returns. A dropped position shows the state of the
last kept one before it, which is what predicts the next token. Layers, attention and key-value cache hold the reduced
tokens only; attention maps, if requested, have their size.

Positions: with one-dimensional positions the rows close up, as if the processor had written fewer placeholders.
M-RoPE positions stay those of the source: a kept token keeps its position in time, height and width.

Differs from published plugins (ToMe, VisionZip, FrameFusion), which rebind classes or methods of every model in the
process and have no way back: here are forward hooks of one instance, and its encoding methods wrapped to learn where
one item ends and the next begins, all removed on exit. No attention maps, no copied forward, one row a family.

What a call needs to remember belongs to its thread, so threads that share an attached model do not see each other's
pictures. Hooks belong to one model: a deep copy or a pickle of an attached model raises, and so does a
call of a shallow copy or of a DataParallel replica, which would read another model's features.

    attaching.py  attach                     families.py  the table of models     choices.py  reducers and budgets
    handle.py     the hooks, and the handle  items.py     where items stand       rows.py     shorter rows
"""

from tokenthrift.attachment.attaching import attach
from tokenthrift.attachment.choices import reducer_from
from tokenthrift.attachment.families import FAMILIES, Family, Medium, register_family
from tokenthrift.attachment.handle import Attachment

__all__ = ["FAMILIES", "Attachment", "Family", "Medium", "attach", "reducer_from", "register_family"]
