"""What the shipped plans start from: records, a tokenizer, random weights and a judge's answers.

`toy` is the quickstart's world, with what Ghost Attention and context distillation ask for besides;
`gsm8k` are school problems. The plans of these names are in `recipes/`.
"""
