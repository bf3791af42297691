"""Raw text to a corpus: `llama2rt corpus RECIPE.toml --out DIR`.

`recipe` says what is asked; `chunks` divides the input into parts that are read alike wherever they
are read; `cleaning` takes one through the steps of documents (`normalise`, `language`, `quality`,
`personal`, `contamination`); `duplicates` compares all of them; `output` writes what is left as
text and token shards; `job` runs these in processes and goes on after a kill; `page` reports.

Every step streams: memory depends on the size of a chunk and on the evaluation sets, not on how
much text there is. Left out: fetching, HTML, models that judge or name languages.
"""
