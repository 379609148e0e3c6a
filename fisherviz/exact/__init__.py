"""The exact Fisher: passes over data, blocks, products, solves, spectra, samples, cumulants."""
