"""Language models that read a prefix of multimodal tokens.

masked  the protocol of masked-diffusion backbones, `MaskedDiffusionBackbone`, and what they cache, `Context`
prefix  a bidirectional language model (BERT, ModernBERT, or a Llama without causal mask) behind that protocol
"""
