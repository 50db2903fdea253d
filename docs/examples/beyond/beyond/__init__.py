"""Memories that the objective suggests and nobody has published, as far as we know: docs/beyond.md says what they are
and what came of them."""
