"""Where models run: the device that is named, or the best there is."""

from __future__ import annotations

__all__ = ["working_device"]


def working_device(name: str | None) -> str:
    """The device of that name, once it is known to work, or the best there is.

    Raises:
        ValueError: it does not work here.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
