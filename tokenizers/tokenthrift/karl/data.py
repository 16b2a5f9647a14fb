"""The old home of KARL's training data, now `tokenthrift.karl.training.data`; it goes with the next release."""

from tokenthrift.lazy import deprecated

__getattr__ = deprecated(
    __name__, {name: f"tokenthrift.karl.training.data:{name}" for name in ("Images", "KarlDataModule", "random_view")}
)
