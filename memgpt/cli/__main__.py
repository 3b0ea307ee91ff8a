"""`python -m memgpt.cli`: what `memgpt` is, where a Python is named."""

from memgpt.cli import main

main()
