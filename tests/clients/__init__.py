"""Scripts that ask a server with the clients of others, each run in an environment of its own.

Arguments: the address of the API, and a model. Each prints one JSON object with texts: of a chat,
streamed and not, of a completion, two choices, the tokens of log-probabilities, and an error.
"""
