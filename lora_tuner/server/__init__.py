"""OpenAI-compatible server and playground (extra `serve`)."""
