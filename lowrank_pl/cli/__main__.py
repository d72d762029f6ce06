"""`python -m lowrank_pl.cli`, where the console script is not at hand."""

from lowrank_pl.cli import main

main()
