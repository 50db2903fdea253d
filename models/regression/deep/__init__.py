"""Deep memories: a network that learns inside the sequence.

Problem.    m(k) = f(k; W), a network with weights W of its own for every sequence and head, fitted online to the loss
            1/2 ||v_t - f(k_t; W)||^2 or another one. No parallel form has a gradient at the weights of every single
            token, so the tokens of a document fall into mini-batches, and all of one take theirs at the same weights R:
                D_i = -dl_i/dW (R) = X_i^T E_i ,   X what a layer takes in, E the error at what it gives out.
Members.    mlp.py             Titans: W_t = W_0 + a_t (W_{t-1} - W_0) + S_t , S_t = eta_t S_{t-1} + theta_t D_t
            batches.py         one step of any optimiser at the end of a mini-batch (sign, Adam, Shampoo, Muon)
            lact.py            LaCT: that step by Muon for a SwiGLU network, beside attention in a window
            ttt/               TTT: W_t = R + c_p sum_{j<=t} eta_j D_j , c_p the reader's; with layer norm and residual
Tools.      network.py         networks and the gradients of their losses, written out
            optimizers.py      the inner optimisers
            slots.py           mini-batches of documents side by side, and a scan over them
            chunks.py          Titans' dual form, a chunk at a time
            documents.py       the same by our kernels, a document a program
"""

from models.regression.deep.lact import LaCT
from models.regression.deep.mlp import DeepMemory
from models.regression.deep.ttt import TTT

__all__ = ["TTT", "DeepMemory", "LaCT"]
