"""Evaluation: training of the networks of each row of the table, their saved progress, and their scores."""
