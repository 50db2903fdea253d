"""The sizes that a mixer tells its parts."""

from typing import NamedTuple


class Sizes(NamedTuple):
    """D, H, G, K and V: what every decay, feature map and regressor is built for. key_dim is the width of the keys that
    the part gets: of the projected ones for the features, of the features for the regressor and the decay.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
