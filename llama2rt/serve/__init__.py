"""A model behind HTTP, in the shapes of OpenAI's API: `llama2rt serve`.

Importing this package loads no web framework; `app` does.
"""
