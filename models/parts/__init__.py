"""The small parts of a layer, each of them its own file: what a token goes through before and after a memory.

convolution.py  the short convolution, and the shift that it can learn
decay.py        gamma, how fast the past fades
features/       phi, the feature maps of queries and keys
linear.py       whether a linear layer is its weight
norm.py         RMS norm, length one, sum one
rotary.py       rotary positions
orthogonal.py   the nearest orthogonal matrix, for Muon
precision.py    which numbers must keep float32, or float64
sizes.py        the widths that a mixer tells its parts
"""
