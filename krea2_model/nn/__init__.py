"""What all three networks are made of: layers, attention, element-wise kernels."""
