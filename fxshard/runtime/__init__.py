"""What a rank needs when it runs: collectives, weights, process groups."""
