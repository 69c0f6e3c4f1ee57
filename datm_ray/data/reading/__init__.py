"""Reading of image files: finding them, recognising their kind, decoding them, and the built-in sources."""
