"""Building blocks of all three networks: layers, attention, element-wise kernels."""
