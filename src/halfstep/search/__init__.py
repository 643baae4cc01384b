"""Which plan: damage, frontier, fit, evolution, corrections, scores, and what drives them."""
