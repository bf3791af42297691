"""The main job: a small chat model from nothing, aligned as the paper does it, in minutes.

`tasks` says what can be asked, `corpus` writes it down as records, `judge` knows what is true and
`annotator` says it with noise. Nothing here is part of the library's API.
"""
