"""What the manual's page on trust states, measured: a file per paragraph, see `benchmarks.trust.paragraph`."""
