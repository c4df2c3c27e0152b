"""The OpenAI-compatible server and its playground (extra `serve`)."""
