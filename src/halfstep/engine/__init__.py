"""How one trajectory runs, and what it costs: entries, the bank, samplers, profiling."""
