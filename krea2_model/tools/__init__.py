"""Convert, inspect and check, for the command line and the nodes."""
