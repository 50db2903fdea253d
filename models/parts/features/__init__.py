"""phi: the feature maps through which a memory sees keys and queries.

    features(x [B, T, H, K], positions [B, T]) -> [B, T, H, width]

Keys and queries go through the same map, as they must for phi(q) . phi(k) to be a kernel of q and k: a memory that is
linear in the features is a kernel machine of fixed size. A map sees one token at a time. What it draws or learns for a
head belongs to the key head; queries of a group share it.

    kernel                      maps                                positive
    its own                     ReLU, ELU, DPFP, Hedgehog           yes
    its own, learned            MLP                                 with relu
    its own, of the distance    CosFormer                           up to `length` tokens
    (c + b q.k)^p               Polynomial, Rebased (c = 0)         where p is even
    sum_{j<=p} (b q.k)^j / j!   Taylor                              where p is even
    exp(b q.k)                  Performer, in expectation           yes
    exp(-b |q - k|^2 / 2)       Cosine, in expectation              no
                                Nystrom, on learned landmarks       no

Only a positive kernel may be divided by its sum (`normalizer: true`); the others' sums can vanish. b, the inverse
temperature, sharpens the kernel: phi sees sqrt(b) x. It is a number, or "learned", one per head from 1.
"""

from models.parts.features.base import FeatureMap
from models.parts.features.coordinates import DPFP, ELU, MLP, CosFormer, Hedgehog, Identity, ReLU
from models.parts.features.landmarks import Nystrom
from models.parts.features.monomials import Polynomial, Rebased, Taylor
from models.parts.features.random import Cosine, Performer

__all__ = [
    "DPFP",
    "ELU",
    "MLP",
    "CosFormer",
    "Cosine",
    "FeatureMap",
    "Hedgehog",
    "Identity",
    "Nystrom",
    "Performer",
    "Polynomial",
    "ReLU",
    "Rebased",
    "Taylor",
]
