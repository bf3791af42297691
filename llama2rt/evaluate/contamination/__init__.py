"""How much of an evaluation set a model has read in training, and whether that raised its score.

Llama 2, appendix A.6: `overlap` finds the tokens of evaluation samples that training texts hold,
`effect` compares scores of samples by how much of them was found. Both are numpy alone; `commands`
is `llama2rt contamination`, which reads files.
"""
