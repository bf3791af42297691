"""Who answers better: a server of OpenAI's API, a reward model, a preference model, a local model
by prompt, or people, each asked in both orders where the order could matter.

`speakers` answer messages, `scorers` and `speaking` make judges of models and of speakers, `cache`
keeps what was said, `comparing` makes win rates of it.
"""
