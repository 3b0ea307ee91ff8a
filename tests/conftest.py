"""Its place puts tests/ on the import path, for what several test files share."""
