"""The family: every way here to fit a memory to the pairs seen so far, and to read it.

    m_t = argmin_{m in M}  1/2 sum_{i<=t} gamma_i^(t) || v_i - m(k_i) ||^2 ,      o_t = m_t(q_t)

The folders are the family's branches. They differ in what the memory m can be and in how the sum is minimised:

    linear/         m is a matrix, fitted by first-order steps: one or a few gradient steps a pair, never an inverse
    least_squares/  m is a matrix, the best one at every token: the inverse is paid for
    local/          m is fitted anew for every query, from the pairs near it: softmax, and what corrects it
    deep/           m is a network that learns inside the sequence

What all branches share stands here:

    regressor.py    the contract: what a regressor is given, what it returns, what it says of itself
    memory.py       memories of a fixed size, one matrix a head
    chunks.py       a sequence in chunks: padding, decays between tokens, the inverse of a triangular system
    documents.py    packed documents, which do not see each other
"""
