"""Language models that read multimodal tokens.

masked           the protocol of masked-diffusion backbones, `MaskedDiffusionBackbone`, and what they cache, `Context`
prefix           BERT, ModernBERT or a Llama without causal mask, with the memory as a prefix
llada            LLaDA's published weights as such a Llama
causal           any causal language model with the tokens as a prefix, `CausalBackbone`
whisper_decoder  Whisper's decoder, with the memory in its cross-attention
"""
