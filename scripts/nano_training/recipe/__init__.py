"""The recipe of krea2-nano at 256 px: scenes and landscapes, all stages in one timed run."""
