"""How a net is trained: the loop, its run folder, and a method's draft."""
