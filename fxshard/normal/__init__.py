"""The graph in the form that one rule an operator can describe."""
