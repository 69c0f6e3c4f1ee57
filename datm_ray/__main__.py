"""`python -m datm_ray` is the command line."""

from datm_ray.cli import main

main()
