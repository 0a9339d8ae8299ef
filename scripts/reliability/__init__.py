"""What measure_reliability.py and the tests ask of a server: jobs of every kind, and faults."""
