"""Answers of models behind servers with OpenAI's chat completions."""
