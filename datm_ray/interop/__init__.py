"""Files of other programs: expert trajectories (MTT's replay buffers), trained classifiers, sets, and torch files."""
