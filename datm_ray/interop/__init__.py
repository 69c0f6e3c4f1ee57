"""Files of other programs: MTT's expert trajectories, trained classifiers, synthetic sets, and torch files."""
