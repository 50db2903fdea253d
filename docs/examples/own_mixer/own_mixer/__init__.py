"""A mixer in a package of its own: docs/adding_a_mixer.md walks through it."""
