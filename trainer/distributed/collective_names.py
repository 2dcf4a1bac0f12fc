"""Names of the loss's collectives, by which received bytes are counted; imports no torch."""

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "ring")
