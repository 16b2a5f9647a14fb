"""The two halves of KARL itself: features to tokens, and tokens to features.

`autoencoder` holds both halves; `transformer` is what they are made of, `conditioning` gives them the target error, and
`packing` decodes images of similar length together.
"""
