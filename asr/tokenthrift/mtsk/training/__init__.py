"""Training of Llama-MTSK under Lightning.

module         `MtskModule`
assembly       a fresh model around pretrained parts
data           `MtskDataModule`: training and development items
clips          clips, batches, manifests and shards of states
augmentation   noise, rooms and masks, seeded by item and epoch
scales         all scales of a step in the memory of one
start          weights of another model of other rates or strategy, to begin with
"""
