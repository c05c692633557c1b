"""The attention of torch that is FlashAttention."""

from peers.torch_attention import with_backend
from torch.nn.attention import SDPBackend

candidates = with_backend(SDPBackend.FLASH_ATTENTION)
