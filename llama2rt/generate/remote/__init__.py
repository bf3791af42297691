"""Samples from a server that speaks OpenAI's API, with the face of `Engine`."""

from llama2rt.generate.remote.handover import Handover
from llama2rt.generate.remote.sampler import Remote, RemoteOptions

__all__ = ["Handover", "Remote", "RemoteOptions"]
