"""phi: the feature maps through which a memory sees keys and queries.

    features(x [B, T, H, K], positions [B, T]) -> [B, T, H, width]

Keys and queries go through the same map, as they must for phi(q) . phi(k) to be a kernel of q and k. `width` is that of
the output, and `positive` says that no number in it is negative.
"""

from torch import Tensor, nn

from models.sizes import Sizes


class Identity(nn.Module):
    """phi(k) = k: the memory is linear in the keys themselves."""

    positive = False

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.width = sizes.key_dim

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def flops_per_token(self) -> int:
        return 0
