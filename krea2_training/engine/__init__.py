"""The loop of a run: steps, rates, optimisers, states, processes, the curve."""
