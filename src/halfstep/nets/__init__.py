"""What is a net: denoisers, their slices, masks and free channels, and how a folder of one is opened."""
