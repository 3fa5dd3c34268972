"""A GPT of bytes trained on long texts: `python -m examples.long_context --help`, and docs/long_context.md."""
