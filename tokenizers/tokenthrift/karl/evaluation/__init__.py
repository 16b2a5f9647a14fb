"""Measuring a model: `tokenthrift evaluate karl`.

`command` reads the options, `evaluate` measures, `tables` and `plots` make the report of several `ways` of coding.
`sweeps` runs one set of images at many budgets and calibrates, `metrics` measures reconstructions, `complexity`
compares tokens with complexity, and `image_sets` reads images.
"""
