"""Language models that read multimodal tokens.

masked           the protocol of masked-diffusion backbones, `MaskedDiffusionBackbone`, and what they cache, `Context`
prefix           BERT, ModernBERT or a decoder without causal mask, with the memory as a prefix
families         published diffusion models as such backbones: LLaDA, Dream, A2D, Fast-dLLM v2, ModernBERT, BERT
shape            such a backbone as plain data, `BackboneShape`
config           one from plain data and to plain data, `PrefixBackboneConfig`
language_models  the models of transformers behind them: fresh, loaded, cut smaller
tokenizer_files  their tokenizers: `tokenizer.json`, or the files that stand for it
llada            LLaDA's published weights as a Llama
cached           a prefix backbone that keeps keys and values, for the samplers
samplers         how a masked-diffusion model decodes: one loop, one object for each algorithm
causal           any causal language model with the tokens as a prefix, `CausalBackbone`
whisper_decoder  Whisper's decoder, with the memory in its cross-attention
"""
