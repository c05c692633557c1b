"""From a decided kernel to generated Python source and the calls in it."""

from tilejit.lower.skeleton import lower_kernel

__all__ = ["lower_kernel"]
