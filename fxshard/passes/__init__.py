"""The compiler's stages, one a file; ``pipeline`` runs them in order."""
