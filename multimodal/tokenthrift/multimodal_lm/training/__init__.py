"""Training of a `MultimodalLM` under Lightning.

module  `MultimodalModule`: projectors alone, or projectors and LoRA
data    `MultimodalDataModule`: native tokens and questions on disk, as recipes/multimodal/features.py writes them
"""
