"""An app bundle that does at every hospital what it was told to try."""
