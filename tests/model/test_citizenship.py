"""The core through transformers' own interfaces: pipelines, Trainer, LoRA, caches, masks, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from memories import give_memory
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, StaticCache, Trainer, TrainingArguments, pipeline
from transformers.generation import CompileConfig
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from memgpt.model import (
    MemGPTConfig,
    MemGPTForCausalLM,
    MemGPTForMaskedLM,
    MemGPTForMultiTask,
    MemGPTForRecommendation,
    MemGPTForSequenceClassification,
    MemGPTForTokenClassification,
    MemGPTModel,
    MemGPTTokenizer,
)
from memgpt.model.cache import StaticWindowLayer

LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
HEADS = [
    MemGPTModel,
    MemGPTForCausalLM,
    MemGPTForMaskedLM,
    MemGPTForTokenClassification,
    MemGPTForSequenceClassification,
    MemGPTForRecommendation,
    MemGPTForMultiTask,
]


def made(kind: type, **changes):
    """A model of local and global layers whose memory says something."""
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4)
    memory = dict(memory_rows=97, memory_dim=4, memory_layers=[0, 1])
    settings = {**shape, **memory, "layer_types": LAYERS, "sliding_window": 4, "max_position_embeddings": 64, **changes}
    model = kind(MemGPTConfig(num_key_value_heads=2, **settings)).eval()
    for module in model.modules():
        if getattr(module, "_memory_table", False):
            torch.nn.init.normal_(module.weight[1:])
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer() -> MemGPTTokenizer:
    return MemGPTTokenizer.train(["The bank raised its rates in March.", "Apple opened a shop in Paris."] * 5, 300)


@pytest.mark.parametrize(
    "task, kind",
    [
        ("text-generation", MemGPTForCausalLM),
        ("fill-mask", MemGPTForMaskedLM),
        ("token-classification", MemGPTForTokenClassification),
        ("text-classification", MemGPTForSequenceClassification),
        ("feature-extraction", MemGPTModel),
    ],
)
def test_pipelines_find_model_and_tokenizer_in_a_directory(task, kind, tokenizer, tmp_path: Path) -> None:
    made(kind, vocab_size=len(tokenizer), num_labels=3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline(task, model=str(tmp_path), device="cpu")
    assert type(pipe.model) is kind
    texts = ["The bank raised <mask> rates.", "The <mask> in Paris."]
    settings = dict(max_new_tokens=3) if task == "text-generation" else {}
    alone = [pipe(text, **settings) for text in texts]
    assert len(alone[0]) > 0
    if task == "token-classification":
        assert next(texts[0][word["start"] : word["end"]] for word in alone[0]) == "The"
    if task == "fill-mask":
        assert alone[0][0]["sequence"].startswith("The bank raised")


@pytest.mark.parametrize(
    "kind, labels",
    [
        (MemGPTForMaskedLM, "tokens"),
        (MemGPTForSequenceClassification, "several"),
    ],
)
def test_trainer_steps_alike_however_a_batch_is_divided(kind, labels: str, ids: torch.Tensor, tmp_path: Path) -> None:
    """Rows with more and fewer labels: the mean is over all labels of a step, not over the means of its parts."""
    rows = torch.randint(3, 64, (8, 10), generator=torch.Generator().manual_seed(2))
    hidden = torch.arange(10) < torch.arange(8)[:, None]
    targets = {
        "tokens": rows.masked_fill(hidden, -100),
        "several": (rows[:, :3] % 2).float(),
    }[labels]
    data = [dict(input_ids=row, labels=label) for row, label in zip(rows, targets, strict=True)]
    problem = {"several": "multi_label_classification"}.get(labels)
    weights = []
    for size in (8, 2):
        model = made(kind, num_labels=3, problem_type=problem)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=2,
            learning_rate=0.1,
            optim="sgd",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data).train()
        weights.append(model.state_dict())
    start = made(kind, num_labels=3, problem_type=problem).state_dict()
    assert not torch.equal(start["model.norm.weight"], weights[0]["model.norm.weight"])
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-6), name


def test_trainer_evaluates_a_classifier_by_its_labels_alone(ids: torch.Tensor, tmp_path: Path) -> None:
    data = [dict(input_ids=row, labels=label) for label, row in enumerate(ids)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    for model in (made(MemGPTForSequenceClassification), made(MemGPTForSequenceClassification, topics=["a", "b"])):
        assert Trainer(model, arguments, eval_dataset=data).evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("kind", [MemGPTForCausalLM, MemGPTForTokenClassification])
def test_lora_trains_saves_and_merges(kind, ids: torch.Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    task = {MemGPTForCausalLM: "CAUSAL_LM", MemGPTForTokenClassification: "TOKEN_CLS"}[kind]
    base = made(kind, num_labels=3)
    settings = peft.LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj", "key", "value"])
    tuned = peft.get_peft_model(copy.deepcopy(base), settings).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        tuned(input_ids=ids, labels=ids % 3).loss.backward()
        optimizer.step()
    logits = tuned.eval()(input_ids=ids).logits
    assert not torch.allclose(logits, base(ids).logits, atol=1e-4)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.allclose(again(input_ids=ids).logits, logits, atol=1e-6)
    assert torch.allclose(again.merge_and_unload()(ids).logits, logits, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_every_class_takes_vectors_and_gives_hidden_states_and_attentions(kind, ids: torch.Tensor) -> None:
    model = made(kind)
    give_memory(model)
    model.set_attn_implementation("eager")
    task = dict(task="ner") if kind is MemGPTForMultiTask else {}
    output = model(input_ids=ids, output_hidden_states=True, output_attentions=True, **task)
    vectors = model(inputs_embeds=model.get_input_embeddings()(ids), memory_ids=ids, **task)
    assert torch.allclose(output[0], vectors[0], atol=1e-6)
    silent = model(inputs_embeds=model.get_input_embeddings()(ids), memory_ids=torch.full_like(ids, -1), **task)
    assert not torch.allclose(output[0], silent[0], atol=1e-2)
    assert [h.shape for h in output.hidden_states] == [(2, 12, 16)] * 4
    assert [a.shape for a in output.attentions] == [(2, 4, 12, 12)] * 3
    near = (torch.arange(12)[:, None] - torch.arange(12)).abs() <= 4
    assert (output.attentions[0][..., ~near] == 0).all()
    assert (output.attentions[1][..., 11, 0] != 0).all()


@pytest.mark.parametrize("mode", ["causal", "bidirectional", "prefix"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("token", "known"), [(0, True), (5, True), (5, False)])
def test_padding_on_either_side_changes_nothing(
    mode: str, side: str, token: int, known: bool, ids: torch.Tensor
) -> None:
    """Of the padding token with positions, or of any that attention_mask hides, the end token say."""
    pad = (5, 0) if side == "left" else (0, 5)
    inside = slice(5, None) if side == "left" else slice(12)
    ids[:, 7] = ids[:, 2]
    padded, mask = torch.nn.functional.pad(ids, pad, value=token), torch.nn.functional.pad(torch.ones_like(ids), pad)
    prefix = (torch.arange(12) < 6).long().expand(2, -1)
    model = made(MemGPTForCausalLM, **({} if known else {"pad_token_id": None, "mask_token_id": None}))
    give_memory(model)
    plain = model(ids, attention_mode=mode, prefix_mask=prefix).logits
    positions = None if token else (mask.cumsum(1) - 1).clamp(min=0)
    wide = torch.nn.functional.pad(prefix, pad)
    logits = model(padded, mask, positions, attention_mode=mode, prefix_mask=wide).logits
    assert torch.allclose(logits[:, inside], plain, atol=1e-5)


@pytest.mark.parametrize("mode", ["causal", "bidirectional", "prefix"])
def test_packed_documents_read_as_if_alone(mode: str, ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM)
    prefix = (torch.arange(12) < 6).long().expand(2, -1)
    alone = model(ids, attention_mode=mode, prefix_mask=prefix).logits
    positions = torch.arange(12).repeat(2)[None]
    packed = model(
        ids.reshape(1, -1), position_ids=positions, attention_mode=mode, prefix_mask=prefix.reshape(1, -1)
    ).logits
    assert torch.allclose(packed.reshape(2, 12, -1), alone, atol=1e-5)


def test_masked_words_are_read_off_both_sides(ids: torch.Tensor) -> None:
    model = made(MemGPTForMaskedLM)
    masked = ids.clone()
    masked[:, 5] = model.config.mask_token_id
    labels = torch.full_like(ids, -100)
    labels[:, 5] = ids[:, 5]
    output = model(masked, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, 5], ids[:, 5])
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    after = masked.clone()
    after[:, 6] = 3
    assert not torch.allclose(model(after).logits[:, 5], output.logits[:, 5])


def test_masked_words_are_read_alike_behind_padding_and_in_a_packed_row(ids: torch.Tensor) -> None:
    model = made(MemGPTForMaskedLM)
    alone = model(ids).logits
    padded, mask = torch.nn.functional.pad(ids, (5, 0)), torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    assert torch.allclose(model(padded, mask).logits[:, 5:], alone, atol=1e-5)
    packed = model(ids.reshape(1, -1), position_ids=torch.arange(12).repeat(2)[None]).logits
    assert torch.allclose(packed.reshape(2, 12, -1), alone, atol=1e-5)


def test_an_encoder_exports_for_any_batch_and_length(ids: torch.Tensor) -> None:
    model = made(MemGPTForTokenClassification, num_labels=3)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (ids, torch.ones_like(ids)), dynamic_shapes=(sizes, sizes)).module()
    rows = torch.randint(3, 64, (3, 20), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(20) < torch.tensor([[20], [11], [4]])).long()
    assert torch.allclose(exported(rows, mask).logits, model(rows, mask).logits, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static", "static of generate"])
@pytest.mark.parametrize("step", [1, 3])
def test_decoding_by_hand_in_any_pieces_equals_the_full_pass(cache, step: int, ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM)
    past = StaticCache(config=model.config, max_cache_len=16) if cache else None
    if cache == "static of generate":
        sizes = dict(batch_size=len(ids), max_cache_len=16, prefill_chunk_size=None, model_kwargs={})
        past = model._prepare_static_cache("static", **sizes)
        assert any(isinstance(layer, StaticWindowLayer) for layer in past.layers)
    parts = []
    for piece in (ids[:, :6], *ids[:, 6:].split(step, dim=1)):
        output = model(piece, past_key_values=past, use_cache=True)
        past = output.past_key_values
        parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, dim=1), model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_a_prompt_in_pieces_is_generated_from_as_one(size: int, ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM)
    settings = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    wanted = model.generate(ids, **settings)
    found = model.generate(ids, prefill_chunk_size=size, **settings)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.allclose(torch.stack(found.logits), torch.stack(wanted.logits), atol=1e-5)


@pytest.mark.parametrize("settings", [{}, dict(cache_implementation="static"), dict(prefill_chunk_size=3)])
@pytest.mark.parametrize("length", [5, 12])
def test_tokens_hidden_within_a_prompt_stay_so_with_a_cache(settings: dict, length: int, ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM)
    give_memory(model)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, [1, 3]] = mask[1, :4] = 0
    common = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    common |= dict(return_dict_in_generate=True, output_logits=True)
    wanted = model.generate(ids[:, :length], use_cache=False, **common)
    found = model.generate(ids[:, :length], **settings, **common)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits))


@pytest.mark.parametrize("given", [1, 3, 9])
def test_generation_goes_on_from_a_cache_and_the_new_tokens_alone(given: int, ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM)
    settings = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    wanted, split = model.generate(ids, **settings), ids.shape[1] - given
    cache = model(ids[:, :split], use_cache=True).past_key_values
    found = model.generate(ids[:, split:], past_key_values=cache, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(found.sequences, wanted.sequences[:, split:])
    assert torch.allclose(torch.stack(found.logits), torch.stack(wanted.logits), atol=1e-5)


def test_a_cache_that_was_changed_asks_for_the_tokens_before(ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM, layer_types=["full_attention"] * 3)
    full = model(ids).logits
    cache = model(ids[:, :8], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="context_ids"):
        model(ids[[1, 0], 8:9], past_key_values=cache)
    logits = model(ids[[1, 0], 8:9], past_key_values=cache, context_ids=ids[[1, 0], :8]).logits
    assert torch.allclose(logits[:, 0], full[[1, 0], 8], atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_beams=3),
        dict(cache_implementation="static"),
        dict(num_beams=2, cache_implementation="static"),
        dict(prompt_lookup_num_tokens=2),
        dict(assistant_early_exit=1),
        dict(use_cache=False),
    ],
)
def test_ways_to_generate_agree(settings: dict, ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM)
    assisted = {"prompt_lookup_num_tokens", "assistant_early_exit"} & settings.keys()  # one text at a time
    row = ids[:1].repeat(1, 2) if assisted else ids
    common = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    plain = model.generate(row, num_beams=settings.get("num_beams", 1), use_cache=False, **common)
    cached = model.generate(row, **settings, **common) if "use_cache" not in settings else model.generate(row, **common)
    assert torch.equal(plain, cached)


def test_sampling_depends_on_the_seed_alone(ids: torch.Tensor) -> None:
    model, drawn = made(MemGPTForCausalLM), []
    for seed, use_cache in ((0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        drawn.append(model.generate(ids, do_sample=True, max_new_tokens=12, eos_token_id=None, use_cache=use_cache))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("settings", [{}, dict(num_beams=2), dict(cache_implementation="static")])
def test_generation_from_a_prefix_equals_the_full_pass(settings: dict, ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM)
    prefix = torch.ones_like(ids)
    common = dict(attention_mode="prefix", prefix_mask=prefix, max_new_tokens=6, do_sample=False, eos_token_id=None)
    plain = model.generate(ids, use_cache=False, num_beams=settings.get("num_beams", 1), **common)
    assert torch.equal(plain, model.generate(ids, **settings, **common))
    if not settings:
        logits = model(plain, attention_mode="prefix", prefix_mask=prefix).logits
        assert torch.equal(logits[:, 11:-1].argmax(-1), plain[:, 12:])


@pytest.mark.parametrize("settings", [{}, dict(cache_implementation="static")])
def test_vectors_are_a_prefix_as_their_tokens_are(settings: dict, ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM, memory_layers=[], recall_length=0)
    common = dict(attention_mode="prefix", prefix_mask=torch.ones_like(ids), max_new_tokens=6, eos_token_id=None)
    common |= dict(attention_mask=torch.ones_like(ids), do_sample=False, **settings)
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **common)
    assert torch.equal(found, model.generate(ids, **common)[:, 12:])


def test_a_prompt_comes_in_pieces_after_its_prefix_alone(ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM)
    prefix = (torch.arange(12) < 6).long().expand(2, -1)
    common = dict(attention_mode="prefix", prefix_mask=prefix, max_new_tokens=6, do_sample=False, eos_token_id=None)
    common |= dict(return_dict_in_generate=True, output_logits=True)
    wanted, found = model.generate(ids, **common), model.generate(ids, prefill_chunk_size=7, **common)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits))
    with pytest.raises(ValueError, match="prefill_chunk_size: a piece ends within the prefix"):
        model.generate(ids, prefill_chunk_size=5, **common)


def test_generation_goes_on_from_vectors(ids: torch.Tensor) -> None:
    """What they stand for, if `generate` is told; else the memories are silent, and a line says so."""
    model = made(MemGPTForCausalLM)
    give_memory(model)
    common = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    vectors = model.get_input_embeddings()(ids)
    plain = model.generate(ids, **common)
    assert torch.equal(model.generate(ids, inputs_embeds=vectors, **common), plain)
    with CaptureLogger(logging.get_logger("memgpt.model.model")) as said:
        logging.get_logger("memgpt.model.model").warning_once.cache_clear()
        silent = model.generate(inputs_embeds=vectors, **common)
    assert "inputs_embeds without memory_ids" in said.out
    embedded = model.get_input_embeddings()(torch.cat((ids, silent), dim=1))
    assert torch.equal(model(inputs_embeds=embedded).logits[:, 11:-1].argmax(-1), silent)
    common |= dict(attention_mask=torch.ones_like(ids), cache_implementation="static")
    assert torch.equal(model.generate(inputs_embeds=vectors, **common), silent)
    steps = CompileConfig(fullgraph=True, mode=None, backend="eager")
    steps._compile_all_devices = True
    assert torch.equal(model.generate(inputs_embeds=vectors, compile_config=steps, **common), silent)
    model = made(MemGPTForCausalLM, memory_layers=[], recall_length=0)
    vectors = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=vectors, **common), model.generate(ids, **common)[:, 12:])


@torch.no_grad()
def test_memories_read_what_they_are_told_to_after_vectors(ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM)
    give_memory(model)
    vectors, none = model.get_input_embeddings()(ids), torch.full_like(ids[:, :6], -1)
    cache = model(inputs_embeds=vectors[:, :6], use_cache=True).past_key_values
    found = model(ids[:, 6:], past_key_values=cache, memory_ids=ids[:, 6:], context_ids=none).logits
    wanted = model(inputs_embeds=vectors, memory_ids=torch.cat((none, ids[:, 6:]), dim=1)).logits[:, 6:]
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_a_cache_that_was_reset_forgets_its_vectors_for_compiled_steps_too(ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM)
    give_memory(model)
    cache, positions = StaticCache(model.config, max_cache_len=16), torch.arange(12)[None]
    model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    cache.reset()
    compiled = torch.compile(model, backend="eager")
    found = compiled(ids, past_key_values=cache, context_ids=ids[:, :0], position_ids=positions).logits
    torch.testing.assert_close(found, model(ids).logits)


def test_a_mask_that_pools_no_text_is_refused(ids: torch.Tensor) -> None:
    for kind in (MemGPTForSequenceClassification, MemGPTForRecommendation):
        with pytest.raises(ValueError, match=r"to pool a text takes one of \[texts, tokens\]"):
            made(kind)(ids, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))


@pytest.mark.parametrize("problem, shape", [("regression", (2, 3)), ("multi_label_classification", (2, 3))])
def test_texts_may_have_several_labels_or_numbers(problem: str, shape, ids: torch.Tensor) -> None:
    model = made(MemGPTForSequenceClassification, num_labels=3, problem_type=problem)
    logits = model(ids, labels=(labels := torch.ones(shape))).logits
    expected = {
        "regression": torch.nn.functional.mse_loss,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
    }[problem](logits, labels)
    assert model(ids, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_fewer_tokens_are_possible_too(ids: torch.Tensor) -> None:
    model = made(MemGPTForCausalLM)
    model.resize_token_embeddings(40)
    assert model(ids.clamp(max=39)).logits.shape == (2, 12, 40)
    assert len(model.model.ngram_hash.canonical_ids) == 40


def test_another_architecture_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=10)
    BertModel(tiny).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bert") as caught:
        MemGPTForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_damaged_file_is_refused_in_one_line(keep: float, tmp_path: Path) -> None:
    made(MemGPTForCausalLM).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="damaged") as caught:
        MemGPTForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_is_transformers_own_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        MemGPTForCausalLM.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", [MemGPTForCausalLM, MemGPTForTokenClassification])
def test_ids_and_lengths_beyond_the_model_are_refused(kind) -> None:
    model = made(kind)
    for bad in (64, -1):
        with pytest.raises(ValueError, match="vocabulary"):
            model(torch.tensor([[5, bad]]))
    for shape in ((0, 5), (2, 0), (5,)):
        with pytest.raises(ValueError, match="input_ids: expected"):
            model(torch.full(shape, 5))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(torch.full((1, 65), 5))
    assert model(torch.full((1, 64), 5)).logits.shape[1] == 64


def test_scaled_rotary_positions_reach_further() -> None:
    scaled = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)
    assert made(MemGPTForCausalLM, rope_parameters=scaled)(torch.full((1, 128), 5)).logits.shape[1] == 128
    with pytest.raises(ValueError, match="max_position_embeddings"):
        made(MemGPTForCausalLM, rope_parameters=scaled)(torch.full((1, 129), 5))


@pytest.mark.parametrize("kind", ["TOKEN_CLS", "SEQ_CLS"])
def test_prefix_tuning_by_peft_learns_and_padding_stays_unseen(kind: str) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(0)
    classes = {"TOKEN_CLS": MemGPTForTokenClassification, "SEQ_CLS": MemGPTForSequenceClassification}
    shape = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    core = classes[kind](MemGPTConfig(vocab_size=50, memory_rows=31, num_labels=3, **shape))
    before = {name: weight.clone() for name, weight in core.model.state_dict().items()}
    prefix = PrefixTuningConfig(
        task_type=kind,
        num_virtual_tokens=4,
        num_layers=2,
        num_attention_heads=2,
        token_dim=16,
        modules_to_save=["head"],
    )
    model = get_peft_model(core, prefix)
    ids = torch.arange(3, 23).view(4, 5)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    labels = ids % 3 if kind == "TOKEN_CLS" else torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    losses = []
    for _ in range(40):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(weight, before[name]) for name, weight in core.model.state_dict().items())
    model.eval()
    short = model(input_ids=ids[:1, :3], attention_mask=mask[:1, :3]).logits
    padded = model(input_ids=ids[:1], attention_mask=mask[:1]).logits
    torch.testing.assert_close(padded[:, :3] if kind == "TOKEN_CLS" else padded, short)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_what_peft_puts_before_a_text_is_generated_from_as_it_was_trained(kind: str, ids: torch.Tensor) -> None:
    """In training peft passes the whole text as vectors; in generation only its first part."""
    from peft import get_peft_config, get_peft_model

    core = made(MemGPTForCausalLM, layer_types=["full_attention"] * 3)
    give_memory(core)
    shape = dict(num_virtual_tokens=4, num_layers=3, num_attention_heads=2, token_dim=8 if "PREFIX" in kind else 16)
    model = get_peft_model(core, get_peft_config(dict(peft_type=kind, task_type="CAUSAL_LM", **shape))).eval()
    common = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids))
    common |= dict(return_dict_in_generate=True, output_logits=True)
    found = model.generate(input_ids=ids, **common)
    trained = model(input_ids=found.sequences).logits[:, -7:-1]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), trained)
    alone = model.generate(input_ids=ids, use_cache=False, **common)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(alone.logits))


def test_a_checkpoint_of_a_table_per_layer_is_refused(tmp_path: Path) -> None:
    """What was saved before the layers shared one would otherwise load with an empty memory."""
    made(MemGPTForCausalLM).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.memory.table.weight"] = weights.pop("model.memory_table.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="shared one; pretrain it again"):
        MemGPTForCausalLM.from_pretrained(tmp_path)


def test_a_packed_row_may_be_longer_than_any_of_its_texts(ids: torch.Tensor) -> None:
    """As transformers packs for attention without padding: positions that start again, and none beyond the limit."""
    model = made(MemGPTForCausalLM, max_position_embeddings=12)
    packed = model(ids.flatten()[None], position_ids=torch.arange(12).repeat(2)[None]).logits
    torch.testing.assert_close(packed.view(2, 12, -1), model(ids).logits, rtol=1e-4, atol=1e-5)
    padded = torch.cat((torch.zeros_like(ids[:, :3]), ids), dim=1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    shifted = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
    torch.testing.assert_close(shifted, model(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="13 tokens are more than the model's max_position_embeddings=12"):
        model(padded[:, :13], position_ids=torch.arange(13)[None])


def test_a_prefix_is_brought_where_accelerate_has_put_its_weights(ids: torch.Tensor) -> None:
    from accelerate import cpu_offload

    model = made(MemGPTForTokenClassification, prefix_length=3)
    with torch.no_grad():
        before = model(ids).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model(ids).logits, before)
        model = made(MemGPTForTokenClassification)
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        with pytest.raises(ValueError, match="without offload_buffers=True"):
            model(ids)


def test_a_model_without_weights_gives_shapes_alone(ids: torch.Tensor) -> None:
    with torch.device("meta"):
        model = MemGPTForTokenClassification(MemGPTConfig(vocab_size=64, hidden_size=16, num_labels=3)).eval()
    assert model(ids.to("meta")).logits.shape == (2, 12, 3)
    with pytest.raises(ValueError, match="load the model's weights"):
        model(ids)


def test_a_plan_of_tensor_parallelism_names_what_there_is() -> None:
    for gated in (True, False):
        model = made(MemGPTModel, gated_mlp=gated)
        names = {name.replace("layers.0.", "layers.*.") for name, _ in model.named_modules()}
        assert set(model.tp_plan) <= names
        assert "base_model_tp_plan" not in model.config.to_json_string()


def test_what_is_exported_answers_with_the_same_cache(ids: torch.Tensor) -> None:
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    model = made(MemGPTForCausalLM)
    register_cache_pytrees_for_model(model)
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": True}, strict=False)
        got, wanted = (run(input_ids=ids, use_cache=True) for run in (exported.module(), model))
    torch.testing.assert_close(got.logits, wanted.logits)
    assert torch.equal(got.past_key_values.last_ids[0], wanted.past_key_values.last_ids[0])


def test_an_empty_text_in_a_batch_spoils_nothing() -> None:
    """transformers' collator hides all of it."""
    torch.manual_seed(0)
    model = MemGPTForSequenceClassification(
        MemGPTConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_labels=2)
    )
    ids, mask = torch.tensor([[5, 6], [0, 0]]), torch.tensor([[1, 1], [0, 0]])
    loss = model(ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert loss < 10
    assert all(p.grad is None or (p.grad.isfinite().all() and p.grad.abs().max() < 100) for p in model.parameters())
    alone = model.eval()(ids[:1], attention_mask=mask[:1]).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:1], alone)
