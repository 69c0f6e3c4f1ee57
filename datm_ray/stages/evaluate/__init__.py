"""Evaluation: training of the networks of each row of the accuracy table, their saved progress, and their scores."""
