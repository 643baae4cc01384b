"""What is a value: plans, recipes, processes, records, and the run folder. No torch at import."""
