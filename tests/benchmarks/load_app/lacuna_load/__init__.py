"""The round driver over a vector without a network."""
