"""Recipes for a user's own images: rules choose every value from the data, the images per class and the time."""
