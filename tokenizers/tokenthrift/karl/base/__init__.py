"""Base tokenizers: an image to a grid of features and back.

`vqgan` is MaskGIT's, the default; `autoencoder_kl` is that of latent diffusion; `convolution` is what both are made of.
"""
