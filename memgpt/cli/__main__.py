"""`python -m memgpt.cli`: the command `memgpt`, run by a chosen Python interpreter."""

from memgpt.cli import main

main()
