"""A model as a graph, and which calls the graph serves."""
