"""How good it is: features, distances with intervals, the judge, spectra, restoring."""
