"""What estimators do without a trained parameter, each a Finding: a table, a figure, and what was claimed beforehand.

switching.py    local linear below softmax, least squares below linear, where the keys' spread switches
distances.py    softmax over keys of length one is a kernel of distance; without its sum it is not stable
taylor.py       how many orders of its series softmax needs
optimizers.py   sign, Adam, Shampoo and Muon as the rule by which a memory learns in context
parabola.py     least squares in the right features has no error left
functions.py    errors along the sequence, for five functions that are met in context
"""
