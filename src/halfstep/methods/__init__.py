"""One paper, one file: its header, its loss, and the draft of its bank."""
