"""Training under Lightning: `tokenthrift fit --config recipes/karl/NAME.yaml`.

`base_tokenizer` trains a base tokenizer, `module` the two stages of KARL, whose common part is `stage`. `data` reads
images. `curriculum`, `losses`, `discriminator` and `guidance` are an idea each; `image_log` shows reconstructions.
"""
