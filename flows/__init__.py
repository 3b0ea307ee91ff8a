"""Flows: what operators run and watch in Prefect. A flow only orchestrates; the work is in memgpt/stages."""
