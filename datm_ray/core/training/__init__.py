"""Training of networks: experts and scored networks, their rates and curriculum, and labels of a teacher."""
