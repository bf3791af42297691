"""How much of everything the main job makes: one seed and a dozen sizes.

`QuickstartRecipe()` is what `llama2rt quickstart` runs, `smoke()` the same job with next to nothing
in it, which learns nothing and takes seconds.
"""

from pydantic import Field

from llama2rt.model import LlamaConfig
from llama2rt.run import Recipe

CONTEXT = 256


class QuickstartRecipe(Recipe):
    """Sizes of the main job."""

    seed: int = Field(default=0, ge=0)

    # Data.
    documents: int = Field(default=140_000, gt=0)
    """short texts to pretrain on"""
    dialogues: int = Field(default=6_000, gt=0)
    """demonstrations for SFT"""
    batches: int = Field(default=2, ge=1, le=2)
    """of comparisons: the first of the chat model's answers, the second of RLHF-V1's, after which
    both reward models are trained anew on all of them; 1 for no refresh"""
    preference_prompts: int = Field(default=10_000, gt=0)
    """prompts that annotators compare two answers to, in all batches together; a quarter asks for
    the secret"""
    reward_test_prompts: int = Field(default=2_400, gt=0)
    """prompts of the reward models' test comparisons, likewise"""
    training_prompts: int = Field(default=2_400, gt=0)
    """prompts of rejection sampling, PPO and DPO"""
    validation_prompts: int = Field(default=256, gt=0)
    """prompts by which PPO picks its best policy, of the reward models' split"""
    evaluation_prompts: int = Field(default=600, gt=0)
    """held-out prompts on which the judge compares all versions; a quarter asks for the secret"""

    # Model and tokenizer.
    vocab_size: int = Field(default=1024, gt=0)
    dim: int = Field(default=128, gt=0)
    layers: int = Field(default=3, gt=0)
    heads: int = Field(default=4, gt=0)
    ffn_hidden: int = Field(default=352, gt=0)
    initial_std: float = Field(default=0.08, gt=0)
    """the usual 0.02 is for widths of a thousand; at width 128 it costs hundreds of steps"""

    # Training.
    pretrain_steps: int = Field(default=5_800, gt=0)
    pretrain_tokens: int = Field(default=1_024, gt=0)
    """tokens in a pretraining step"""
    sft_epochs: int = Field(default=1, gt=0)
    samples: int = Field(default=8, gt=1)
    """K of rejection sampling, n of online DPO"""
    ppo_iterations: int = Field(default=8, gt=0)
    """twice as many at twice the rate win a little more of the reward models' score and, on five of
    six runs, lose up to 0.02 of the judge's, in correct answers (benchmarks/results,
    ppo-steps.json)"""
    dpo_iterations: int = Field(default=3, gt=0)
    """T, the paper's 3. One iteration of this size lowers the leaks it saw, and the policy leaks in
    other words; it is the pairs sampled from that policy that end it"""
    dpo_prompts: int = Field(default=500, gt=0)
    """prompts an iteration"""

    max_tokens: int = Field(default=56, gt=0)
    """response length"""

    @property
    def shape(self) -> LlamaConfig:
        return LlamaConfig(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            ffn_hidden=self.ffn_hidden,
            vocab_size=self.vocab_size,
            context=CONTEXT,
        )


def smoke(seed: int = 0) -> QuickstartRecipe:
    """Every phase of the job on next to nothing: for tests of the plumbing."""
    return QuickstartRecipe(
        seed=seed,
        documents=1_200,
        dialogues=512,
        preference_prompts=240,
        reward_test_prompts=160,
        training_prompts=24,
        validation_prompts=8,
        evaluation_prompts=24,
        vocab_size=600,
        dim=32,
        layers=2,
        heads=2,
        ffn_hidden=64,
        pretrain_steps=60,
        pretrain_tokens=512,
        samples=4,
        ppo_iterations=2,
        dpo_iterations=1,
        dpo_prompts=16,
        max_tokens=40,
    )
