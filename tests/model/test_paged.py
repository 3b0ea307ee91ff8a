"""Continuous batching answers as `generate` does, request by request."""

import pytest
import torch
from memories import give_memory
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from memgpt.model import MemGPTConfig, MemGPTForCausalLM, paged

LOCAL, GLOBAL = "sliding_attention", "full_attention"
PREFIX = list(range(3, 43))


def model(**changes) -> MemGPTForCausalLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, sliding_window=16)
    config = MemGPTConfig(memory_rows=997, memory_dim=8, **{**shape, "layer_types": [LOCAL, GLOBAL], **changes})
    made = MemGPTForCausalLM(config).eval()
    give_memory(made)
    return made


def batch(made: MemGPTForCausalLM, inputs: list[list[int]], **changes) -> list[GenerationOutput]:
    """What `generate_batch` answers, with a cache of a few small pages; by default it takes most of the memory."""
    settings = {"max_new_tokens": 9, "eos_token_id": -1, "pad_token_id": 0, "do_sample": False, **changes}
    pages = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=24)
    return list(made.generate_batch(inputs, GenerationConfig(**settings), pages).values())


@pytest.mark.parametrize("layers", [None, []])
def test_requests_that_share_batches_get_what_each_gets_alone(layers: list[int] | None) -> None:
    """Prompts shorter than what the memory reads back, one that takes several batches, two that begin alike."""
    made = model(memory_layers=layers)
    prompts = [[5], [9, 10, 11], [7] * 30, [*PREFIX, 50], [*PREFIX, 51, 52]]
    alone = [
        made.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None)[0, len(prompt) :]
        for prompt in prompts
    ]
    together = batch(made, prompts)
    assert [answer.error for answer in together] == [None] * len(prompts)
    found = {tuple(answer.prompt_ids): answer.generated_tokens for answer in together}
    assert [found[tuple(prompt)] for prompt in prompts] == [tokens.tolist() for tokens in alone]


def test_answers_that_fork_take_their_ids_along() -> None:
    made, prompt = model(), [9, 10, 11, 12, 13]
    alone = made.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None)[0, 5:]
    forks = batch(made, [prompt, [4] * 20], num_return_sequences=3, do_sample=True, top_k=1)
    found = [answer.generated_tokens for answer in forks if answer.prompt_ids == prompt]
    assert found == [alone.tolist()] * 3


def test_a_model_whose_layers_all_forget_is_refused_in_words() -> None:
    made = model(layer_types=[LOCAL, LOCAL])
    assert all("full attention" in str(answer.error) for answer in batch(made, [[5, 6]]))


def test_a_kernel_that_writes_to_the_cache_itself_is_refused_in_words() -> None:
    class Cache:
        cache_allocators = {GLOBAL: None}  # noqa: RUF012

    with pytest.raises(ValueError, match="sdpa"):
        paged.context_ids(
            Cache(),
            torch.zeros(1, 1, dtype=torch.long),
            5,
            cu_seq_lens_q=torch.tensor([0, 1]),
            cu_seq_lens_k={GLOBAL: torch.tensor([0, 1])},
            read_index=[],
            write_index=[],
            block_table=torch.zeros(1, 1, 1),
        )
