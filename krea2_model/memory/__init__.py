"""Which weights are on the device while a pipeline runs."""
