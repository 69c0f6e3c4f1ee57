"""Files of other programs: trajectories saved by MTT and its successors (replay buffers), and torch files."""
