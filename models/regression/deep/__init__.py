"""Deep memories: a network that learns inside the sequence.

Problem.    m(k) = f(k; W), a network with weights W of its own for every sequence and head, fitted online to the loss
            1/2 ||v_t - f(k_t; W)||^2 or another one. No parallel form has a gradient at the weights of every single
            token, so the tokens of a document fall into mini-batches, and all of one take theirs at the same weights R:
                D_i = -theta_i dl_i/dW (R) = theta_i X_i^T E_i ,   X what a layer takes in, E the error behind it.
Recipe.     A network (layers, activation, biases, layer norm, residual), a loss, and a rule, which says what becomes of
            the D of a mini-batch:
                Online     W_t = W_0 + a_t (W_{t-1} - W_0) + S_t ,  S_t = eta_t S_{t-1} + D_t
                Averaged   W_t = R + c_p sum_{j<=t} D_j , c_p the reader's
                AtEnd      W_t = R, and a step of any optimiser (sign, Adam, Shampoo, Muon) at the mini-batch's end
Members.    mlp.py             Titans, an MLP: Online, or whatever else its settings say; Yaad, Moneta and Memora of
                               Miras; Atlas, AtEnd by Muon
            ttt.py             TTT-Linear and TTT-MLP: Averaged, with layer norm, biases and residual
            tnt.py             TNT: one of Titans for all of a document, and others that begin anew in every shard
            lact.py            LaCT, a SwiGLU network: AtEnd by Muon, beside attention in a window
Recipes.    network.py         networks and the gradients of their losses, written out
            rules.py           the rules, token by token and in their dual form
            retention.py       Online with weights divided by their norm, or of one mass
            windows.py         writes of several pairs by each token, for any rule but Averaged
            optimizers.py      the inner optimisers
            memory.py          what all members share
Forms.      forms.py           a call, by the definition or the dual form
            slots.py           mini-batches of documents side by side, and a scan over them
            accelerated.py     a call by our kernels, which declare the recipes that they compute
"""

from models.regression.deep.lact import LaCT
from models.regression.deep.mlp import DeepMemory
from models.regression.deep.tnt import TNT
from models.regression.deep.ttt import TTT

__all__ = ["TNT", "TTT", "DeepMemory", "LaCT"]
