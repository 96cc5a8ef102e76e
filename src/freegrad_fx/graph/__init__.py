"""Analysis, provenance and serialisation of fx graphs. Independent of rules."""
