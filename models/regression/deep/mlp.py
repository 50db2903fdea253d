"""Deep memories: an MLP that learns within the sequence.

Problem.    momentum.py's, gradient descent with momentum and weight decay on l_t(M) = 1/2 ||v_t - f_M(k_t)||^2 or
            another loss, for an f that is a network of weights M = (W_1, ..., W_L) (network.py).
Solution.   For every weight, with S its momentum and one eta, theta and a per head and token (Online, rules.py),
                S_t = eta_t S_{t-1} - theta_t dl_t/dM (R_t) ,    M_t = W + a_t (M_{t-1} - W) + S_t ,
                o_t = f(q_t) with the weights M_t .
            (Titans, Behrouz et al. 2025, equations 13 to 15.) The tokens of a document fall into mini-batches of b =
            `grad_batch`, and all of one take their gradients at the memory after the previous one, R (equation 16; the
            paper's t - mod(t, b) would show a mini-batch's last token its own write). Every document begins with M =
            M_0, learned for each head, and S = 0.
Forgetting. W = M_0, `forget_to: start`: what fades is what the sequence has taught. W = 0, `forget_to: zero`, is the
            paper's: the features of the start fade as well, and with them, since W_2 learns in proportion to what W_1
            lets through and W_1 to W_2, all that a network of two layers can learn. For a matrix that starts at zero
            the two are one.
Mini-batch. Another b is another model, and a model is best with the one that it was trained with (TNT, Li et al. 2025):
            b is no choice of speed. It is what makes the layer parallel, though: no form of the rule with b = 1 is.
Stability.  Momentum sums a constant gradient to theta / (1 - eta) of it, so theta = (1 - eta) theta' / b; the gates are
            not tied as momentum.py's are. network.py's limit holds the step of a token to what a
            matrix with keys of length one would make of it. Nothing diverges then, whatever the gates; with three
            layers and more, b = 1 and theta' = 1, reads have been seen to overshoot fifteenfold for a while.
Exactness.  The dual form equals the recurrence up to rounding, whatever the chunk, gradients included.
Miras.      Three recipes of Behrouz et al. 2025 (arXiv 2504.13173), without momentum: Yaad, whose errors count by
            their sign where they are long (`inner_loss: switch`); Moneta, with |e|^3 and weights divided by a power of
            their fourth norm (`inner_loss: lp`, `retention: 4`, retention.py); Memora, whose weights share a mass
            (`mass`). There |e| is compared with a
            threshold delta from the data, gates are per channel, and the network is x + LN(gelu MLP); here the root
            mean square of e is compared with a number delta, and gates are per head.
Atlas.      Behrouz et al. 2025 (arXiv 2505.23735, equations 32 and 33): a window of pairs (windows.py), polynomial
            features, Muon. There Muon steps at every token, for which a chunk holds the S_t of all its tokens as
            matrices; here once a mini-batch. Their network is a gated MLP or x + LN(gelu MLP), and all of it fades.
Others.     titans-pytorch sums the gradients of a chunk, with gates pooled over it, at weights that it holds for every
            chunk; by default all at M_0, so that no gradient of chunk 3 knows of chunk 1. fla 0.6.0 has no deep memory.

Shapes: B batch, T tokens, H heads, K key width, V value width, in and out of a layer.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.linear import read
from models.parts.precision import wide
from models.parts.sizes import Sizes
from models.regression.deep.memory import NetworkMemory, Parameters, shares
from models.regression.deep.network import ACTIVATIONS, LOSSES, Network
from models.regression.deep.optimizers import INNER_OPTIMIZERS
from models.regression.deep.retention import Entropic, Normed
from models.regression.deep.rules import AtEnd, Averaged, Gates, Online, Start
from models.regression.linear.omega import shares_of

OPTIMIZERS = ("momentum", "sgd", "average", *INNER_OPTIMIZERS)
FORGET_TO = ("start", "zero")


class DeepMemory(NetworkMemory):
    """Titans' memory for an MLP, with free gates:

        eta = sigmoid(x W_eta + c_eta) ,    theta = (1 - eta) sigmoid(x W_theta + c_theta) / grad_batch ,

    and a, the recipe's decay. The start M_0 is learned: at first the last layer is zero, so that an empty memory reads
    zero, and the others normal with variance 1 / in, or 1 for the first, whose keys have length one. Its parameter
    counts in units of 1 / grad_batch, as its writes do, which it would drown otherwise: after 200 steps of associative
    recall, with mini-batches of 64, 16 % of the answers are right without, 97 % with. (Optimisers that are blind to the
    scale of a gradient have no such unit, and no zeros to make noise of.)

    depth: layers of the MLP, 1 to 4; expansion: its inner widths are expansion K.  activation: silu | gelu | gelu_tanh.
    bias: of every layer.  residual: f(x) + x, for K = V.  layer_norm: of what is added to x, with learned scale and
        shift.
    inner_loss: l2 | huber | switch | lp | dot, of which lp has the power `p`, huber and switch the width `delta`.
    inner_optimizer: momentum | sgd, which has no S | average, TTT's, with steps of theta' grad_batch, a learned share c
        and no decay | sign | adam | shampoo | muon, which step at the end of a mini-batch, by the mean of its theta';
        muon has the mean of eta for a momentum (rules.py has all).
    retention: q of retention.py, for momentum and sgd; 2: the weights are not divided by anything.
    mass: u of retention.py's entropy, for sgd, in units of the start's deviations; null: no such thing.
    window: c of windows.py, the pairs that a token writes, by the weights of linear/omega.py.
    grad_batch: b, a part of the model.  forget_to: start | zero.  limit_steps: false leaves steps as long as they are,
        as in the paper (network.py).  remat: of NetworkMemory.
    """

    accepts_decay: tuple[str, ...] = ("none", "head")
    reads = ("step_size", "momentum", "weights")

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        grad_batch: int = 64,
        depth: int = 2,
        expansion: float = 4.0,
        activation: str = "silu",
        residual: bool = False,
        layer_norm: bool = False,
        inner_loss: str = "l2",
        p: float = 1.5,
        delta: float = 1.0,
        inner_optimizer: str = "momentum",
        forget_to: str = "start",
        remat: int = 8,
        bias: bool = False,
        limit_steps: bool = True,
        retention: float = 2.0,
        window: int = 1,
        mass: float | None = None,
    ) -> None:
        super().__init__(sizes, backend, chunk, grad_batch, remat)
        for name, value, allowed in (
            ("activation", activation, ACTIVATIONS),
            ("inner_loss", inner_loss, LOSSES),
            ("inner_optimizer", inner_optimizer, OPTIMIZERS),
            ("forget_to", forget_to, FORGET_TO),
        ):
            if value not in allowed:
                raise ValueError(f"regressor.{name}={value} is not one of {', '.join(allowed)}")
        (D, H, _, K, V), inner = sizes, round(expansion * sizes.key_dim)
        if residual and K != V:
            raise ValueError(
                f"regressor.residual=true adds keys of width {K} to values of width {V}; only false is possible"
            )
        for name, number, holds, says in (
            ("depth", depth, 1 <= depth <= 4, "1, 2, 3 or 4"),
            ("expansion", expansion, inner >= 1, f"at least 1 / {K}, for an inner width of one"),
            ("p", p, p >= 1, "at least 1"),
            ("delta", delta, delta > 0, "positive"),
            ("retention", retention, retention >= 2, "at least 2, which divides by nothing"),
            ("window", window, window is not None and window >= 1, "a number of pairs, at least 1"),
            ("mass", mass, mass is None or mass > 0, "positive, or null for none"),
        ):
            if not holds:
                raise ValueError(f"regressor.{name}={number} must be {says}")
        self.fades, self.function_class = forget_to == "zero", f"MLP of {depth} layers"
        power = {"lp": p, "huber": delta, "switch": delta}.get(inner_loss, 0.0)
        network = Network(activation, residual, inner_loss, power, limit_steps, bias)
        optimizer = INNER_OPTIMIZERS.get(inner_optimizer)
        if retention != 2 and (inner_optimizer not in ("momentum", "sgd") or self.fades):
            raise ValueError(
                f"regressor.retention={retention} goes with inner_optimizer=momentum or sgd, and forget_to=start"
            )
        if mass is not None and (inner_optimizer != "sgd" or self.fades or retention != 2):
            raise ValueError(f"regressor.mass={mass} goes with inner_optimizer=sgd, forget_to=start and retention=2")
        self.step_size, momentum = nn.Linear(D, H), nn.Linear(D, H)  # both drawn: M_0 has the seed's numbers anyway
        if optimizer is not None:
            self.rule, has_momentum = AtEnd(network, optimizer), optimizer.has_momentum
            self.fit = f"{inner_optimizer} step for {grad_batch} pairs"
        elif inner_optimizer == "average":
            self.rule, has_momentum, self.accepts_decay = Averaged(network), False, ("none",)
            self.fit = f"gradient steps, mini-batches of {grad_batch}"
            self.token_offset = nn.Parameter(torch.zeros(grad_batch))
        else:
            has_momentum = inner_optimizer == "momentum"
            self.rule, self.fit = Online(network, has_momentum), "gradient step" + ", momentum" * has_momentum
            if retention != 2:
                self.rule, self.fit = Normed(network, has_momentum, retention), f"{self.fit}, L{retention:g} retention"
            if mass is not None:
                units = (mass, *[mass * inner**-0.5] * (depth - 1))
                self.rule, self.fit = Entropic(network, False, units), "multiplicative step, entropic retention"
        self.momentum = momentum if has_momentum else None
        if window > 1 and (bias or layer_norm or inner_optimizer == "average"):
            raise ValueError(
                f"regressor.window={window} goes with bias=false and layer_norm=false, so that no pair writes "
                "nothing, and with any inner_optimizer but average"
            )
        self.window, self.weights = window, nn.Linear(D, H * window) if window > 1 else None
        widths, scales = [K, *[inner] * (depth - 1), V], [1.0, *[inner**-0.5] * (depth - 1)]
        scales[-1] *= isinstance(self.rule, AtEnd | Entropic)  # whose first mini-batch reads it as it is
        drawn = (s * torch.randn(H, n, m) for s, (n, m) in zip(scales, pairwise(widths), strict=True))
        self.start = Parameters(F.pad(w, (0, 0, 0, int(bias))) for w in drawn)
        self.norm = Parameters([torch.ones(H, 1, V), torch.zeros(H, 1, V)] if layer_norm else [])

    def begin(self) -> Start:
        *others, last = self.start()
        last = last if isinstance(self.rule, AtEnd) else last / self.grad_batch
        return Start((*others, last), self.fades, self.norm())

    def gates(self, x: Tensor, log_decay: Tensor | None = None) -> Gates:
        """1 - eta is the sigmoid of the negative, log eta logsigmoid: neither loses digits where eta is near 1 or 0."""
        rate, b, window = wide(read(self.step_size, x)).sigmoid(), self.grad_batch, None
        if self.weights is not None:
            window = shares_of(wide(read(self.weights, x)).unflatten(-1, (-1, self.window)))
        logit = None if self.momentum is None else wide(read(self.momentum, x))
        if isinstance(self.rule, AtEnd):
            nothing = torch.zeros_like(rate)
            eta = nothing if logit is None else logit.sigmoid() / b
            sums = torch.stack([nothing if log_decay is None else log_decay, rate / b, eta], dim=-1)
            return Gates(rate / b, sums=sums, window=window)
        if isinstance(self.rule, Averaged):
            return Gates(rate, share=shares(self.token_offset))
        if logit is None:
            return Gates(rate / b, log_decay=log_decay, window=window)
        return Gates((-logit).sigmoid() * rate / b, F.logsigmoid(logit), log_decay, window=window)

    def tokens_at_once(self, v: Tensor) -> int:
        return self.chunk or (self.grad_batch if isinstance(self.rule, AtEnd) else super().tokens_at_once(v))

    def gate_flops(self) -> int:
        gates = 1 + (self.momentum is not None) + (self.window if self.window > 1 else 0)
        return 2 * self.num_heads * self.hidden_size * gates
