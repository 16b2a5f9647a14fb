"""Measuring a model: `tokenthrift evaluate karl`.

`evaluate` is the command, `tables` and `plots` make the report. `sweeps` runs one set of images at many budgets and
calibrates, `metrics` measures reconstructions, `complexity` compares tokens with complexity, `image_sets` reads images.
"""
