"""What rejection sampling, PPO and online DPO share: answers of a policy, and what they are worth.

`sampling` draws answers, `reward` ranks them, `logprobs` gives their tokens' log-probabilities by
the training path, `balance` shares all of that among ranks, `metrics` says what a set of answers
is like, `responses` is the record and its file. Everything after sampling works on tokens exactly
as they were sampled: encoding a response's text again could give other tokens, and a response cut
off by the length limit would gain an EOS that the policy never produced. Only `pairwise` and
`judge`, which lay two responses out in one text and rank by `ranking`, read them as text.
"""
