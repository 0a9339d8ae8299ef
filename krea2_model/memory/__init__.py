"""The placement of weights on the device while a pipeline runs."""
