"""First images of a set, and the crops of real images that may be among them."""
