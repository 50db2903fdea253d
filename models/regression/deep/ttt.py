"""Test-time training: a memory with a layer norm, linear or with a hidden layer, trained in mini-batches.

Problem.    An inner model with a residual and a layer norm,
                f(x) = x + LN(z(x)) ,    z(x) = x W + b    or    z(x) = gelu(x W_1 + b_1) W_2 + b_2 ,
            is fitted online to the pairs by gradient descent on
                l_j(W) = 1/2 ||v_j - f(k_j; W)||^2 .
Solution.   The tokens of a document fall into mini-batches of b. All of one take their gradients at the weights W that
            the mini-batch begins with, and token t, the p-th of its mini-batch, reads the weights
                W_t = W - c_p sum_{j<=t} eta_j grad l_j(W) ,    o_t = f(q_t; W_t) ,
            with the sum over its own mini-batch. The next one begins with the last W_t, a document with learned W_0.
            c_p = max(1/p + learned, 0) turns the sum into an average and belongs to the token that reads; eta_j =
            sigmoid(x_j w + bias) base_lr / K belongs to the one that writes. So every token weighs the whole mini-batch
            anew: no decay does that. (TTT-Linear and TTT-MLP, Sun et al. 2024, sections 2.4 to 2.7; GELU by tanh.)
Dual form.  Gradients at the same weights are known together. For a layer z = x W + b with inputs X and E = -dl/dz,
            x_t W_t + b_t = x_t W + b + c_p sum_{j<=t} eta_j (x_t.x_j + 1) E_j: products of b x b, layer by layer, and
            no matrix per token (section 2.5). It is the rule Averaged of rules.py, with a bias as one more input.
Calls.      A call may end inside a mini-batch: the state has its first weights, and the sum of its steps so far, as the
            published cache has them.
Exactness.  The dual form equals the recurrence up to rounding, gradients included: those through the inner gradients
            too, that is second derivatives of LN and GELU.
Others.     fla 0.6.0's ttt kernels are not among the backends. They read z(q) + LN(z(q)) for q + LN(z(q)), take eta of
            the token that reads, so that none can say how much it writes, and have no hidden layer.

Shapes: B batch, T tokens, H heads, K key width, which is V, F hidden width, b tokens of a mini-batch.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from models.parts.linear import read
from models.parts.precision import wide
from models.parts.sizes import Sizes
from models.regression.deep.memory import NetworkMemory, Parameters, shares
from models.regression.deep.network import Network
from models.regression.deep.rules import Averaged, Gates, Start

HIDDEN = 4  # F / K
BASE_LR = {"linear": 1.0, "mlp": 0.1}


class TTT(NetworkMemory):
    """The test-time-training layers' memory, with learned W_0, gamma and beta per head, learned c shared by all heads,
    and a learned step size per head and token.

    inner_model: linear | mlp, with a hidden layer of 4 K.
    grad_batch: b, the tokens of a mini-batch.
    base_lr: the step size where its gate is open, times K; null for the paper's, 1 (linear) and 0.1 (mlp).
    remat: mini-batches that the PyTorch form computes again, together, in the backward pass, to keep less; null: none.
    """

    accepts_decay = ("none",)
    reads = ("step_size",)

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        inner_model: str = "linear",
        grad_batch: int = 16,
        base_lr: float | None = None,
        remat: int | None = None,
        chunk: int | None = None,
    ) -> None:
        if remat is not None and remat < 1:
            raise ValueError(f"regressor.remat={remat} is no number of mini-batches; a positive integer, or null")
        super().__init__(sizes, backend, chunk, grad_batch, remat)
        H, K = sizes.num_heads, sizes.key_dim
        if inner_model not in BASE_LR:
            raise ValueError(f"regressor.inner_model={inner_model} is not one of {', '.join(BASE_LR)}")
        if sizes.value_dim != K:
            raise ValueError(
                f"value_dim={sizes.value_dim}: the inner model adds to its input, so values are as wide as keys "
                f"(after the feature map); only value_dim={K} is possible"
            )
        if base_lr is not None and base_lr <= 0:
            raise ValueError(f"regressor.base_lr={base_lr} must be positive, or null for the paper's")
        self.base_lr = BASE_LR[inner_model] if base_lr is None else base_lr
        self.function_class = {"linear": "linear, layer norm", "mlp": "MLP, layer norm"}[inner_model]
        self.fit = f"gradient steps, mini-batches of {grad_batch}"
        self.rule = Averaged(Network("gelu_tanh", residual=True, limit_steps=False, bias=True))
        widths = (K, K) if inner_model == "linear" else (K, HIDDEN * K, K)
        start = [w for a, b in pairwise(widths) for w in (0.02 * torch.randn(H, a, b), torch.zeros(H, 1, b))]
        self.start = Parameters(start)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(H, K)), nn.Parameter(torch.zeros(H, K))
        self.token_offset = nn.Parameter(torch.zeros(grad_batch))
        self.step_size = nn.Linear(sizes.hidden_size, H)

    def begin(self) -> Start:
        """Of every layer W_0 above b_0; W_0 and b_0 take turns in self.start."""
        start = self.start()
        layers = zip(start[::2], start[1::2], strict=True)
        norm = (self.norm_weight.unsqueeze(1), self.norm_bias.unsqueeze(1))
        return Start(tuple(torch.cat(layer, dim=1) for layer in layers), True, norm)

    def gates(self, x: Tensor, log_decay: Tensor | None = None) -> Gates:
        step_size = wide(read(self.step_size, x)).sigmoid() * (self.base_lr / self.key_dim)
        return Gates(step_size, share=shares(self.token_offset))

    def gate_flops(self) -> int:
        return 2 * self.num_heads * self.hidden_size
