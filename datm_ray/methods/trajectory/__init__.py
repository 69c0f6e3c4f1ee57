"""Trajectory matching: MTT, TESLA and DATM, in which a student follows part of an expert's training."""
