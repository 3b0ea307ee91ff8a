"""MemGPT: a memory-augmented GPT for language tasks, and the pipeline that keeps it fresh."""
