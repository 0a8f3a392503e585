"""Is the program the model? Simulation, comparison, proofs of rules, counting."""
