"""`memgpt convert`: another family's checkpoint answers as before, and its new memory can learn."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SmolLM3Config,
)
from typer.testing import CliRunner

from memgpt import cli, config, lineage
from memgpt.errors import UserError
from memgpt.model import MemGPTForCausalLM, MemGPTForTokenClassification
from memgpt.model.convert import convert, memory_shape
from memgpt.stages import pretrain, tokenize

TEXTS = ["Apple rose 3 % . The apple fell , said Mr Reed of the bank; don't stop"] * 10
SHAPE = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=0,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LONG = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=16,
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.0, 2.0, 3.0, 4.0],
)
SOURCES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True, head_dim=16, rms_norm_eps=1e-2)),
    "llama-linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=2.0))),
    "llama-yarn": ("llama", dict(rope_parameters=YARN)),
    "llama-llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama-longrope": ("llama", dict(rope_parameters=LONG)),
    "llama-dynamic": ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1000.0, factor=2.0))),
    "mistral": ("mistral", dict(sliding_window=5)),
    "mistral-full": ("mistral", dict(sliding_window=None, head_dim=4)),
    "qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen2-full": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3-biases": (
        "qwen3",
        dict(attention_bias=True, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    ),
    "gpt2": ("gpt2", dict(layer_norm_epsilon=1e-2)),
    "gpt2-untied": ("gpt2", dict(n_inner=40, activation_function="relu", tie_word_embeddings=False)),
}


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's and Qwen's: one token that ends and pads, none that masks."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's and Mistral's: pieces with a mark for the space, unknown bytes spelt out, nothing to pad with."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["</s>", "<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def write(directory: Path, kind: str, *, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A random checkpoint in which no parameter, bias or norm is left as it starts."""
    torch.manual_seed(0)
    shape = {name: value for name, value in SHAPE.items() if kind != "gpt2" or name != "num_key_value_heads"}
    tokenizer = pieces_tokenizer() if kind in ("llama", "mistral") else bytes_tokenizer()
    shape["vocab_size"] = max(tokenizer.get_vocab().values()) + 1
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to read, not to change."""
    return write(tmp_path_factory.mktemp("source") / "llama", "llama")


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(llama, tmp_path / "broken"))


def edit(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", SOURCES)
def test_answers_are_those_of_the_source(name: str, tmp_path: Path) -> None:
    kind, changes = SOURCES[name]
    source = AutoModelForCausalLM.from_pretrained(write(tmp_path / "source", kind, **changes)).eval()
    convert(tmp_path / "source", tmp_path / "made")
    made = MemGPTForCausalLM.from_pretrained(tmp_path / "made").eval()
    size = source.config.vocab_size
    ids = torch.randint(1, size, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = source(ids).logits
    assert expected.std() > 0.1
    assert torch.allclose(made(ids).logits[..., :size], expected, atol=1e-5 * max(1.0, expected.abs().max().item()))
    settings = dict(max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(made.generate(ids, **settings), source.generate(ids, **settings))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_tokenizer_comes_along_with_what_the_pipeline_needs(kind: str, tmp_path: Path) -> None:
    before = AutoTokenizer.from_pretrained(write(tmp_path / "source", kind))
    convert(tmp_path / "source", tmp_path / "made")
    after = AutoTokenizer.from_pretrained(tmp_path / "made")
    text = " the Bank don't\n 你 <mask>"
    arguments = dict(add_special_tokens=False, split_special_tokens=True)
    assert after(text, **arguments)["input_ids"] == before(text, **arguments)["input_ids"]
    assert after.eos_token_id == before.eos_token_id
    assert len({after.pad_token_id, after.mask_token_id, after.eos_token_id}) == 3
    made = MemGPTForCausalLM.from_pretrained(tmp_path / "made")
    shape = made.config
    assert (shape.pad_token_id, shape.mask_token_id) == (after.pad_token_id, after.mask_token_id)
    canonical = made.model.ngram_hash.canonical_ids
    small, capital = after.convert_tokens_to_ids(["a", "A"])
    assert small != capital
    assert canonical[small] == canonical[capital]
    rows = made.lm_head.weight  # the mean of the others: never the likeliest token
    assert torch.allclose(rows[[shape.pad_token_id, shape.mask_token_id]], rows[: len(before)].mean(0), atol=1e-6)


def test_rows_that_a_vocabulary_has_to_spare_are_used(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(384)
    model.save_pretrained(source)
    made = convert(source, tmp_path / "made")
    assert made.config.vocab_size == 384
    ids = torch.tensor([[5, 6, 383]])
    assert torch.allclose(made(ids).logits, model(ids).logits, atol=1e-5)


def test_the_memory_can_learn(llama: Path, tmp_path: Path) -> None:
    made = convert(llama, tmp_path / "made", memory_layers=[1], memory_rows=50, memory_dim=6)
    ids = torch.tensor([[5, 6, 7, 5, 6, 7]])
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = made(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    table = made.model.memory_table.weight
    reads = len(made.config.memory_ngrams) * made.config.memory_heads
    assert table.shape == (1 + reads * 50, 6)
    assert table.grad is not None
    assert 0 < (table.grad.abs().sum(-1) > 0).sum() <= reads * ids.numel()
    assert table.abs().sum() > 0
    assert losses[1] < losses[0]


def test_precision_is_the_sources_unless_asked(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source)
    convert(source, tmp_path / "made")
    made = MemGPTForCausalLM.from_pretrained(tmp_path / "made")
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    size = model.config.vocab_size
    assert torch.equal(made.lm_head.weight[:size], model.lm_head.weight)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    assert torch.allclose(made(ids).logits[..., :size], expected, atol=0.02 * expected.abs().max().item())
    exact = convert(source, tmp_path / "exact", dtype=torch.float32)
    assert exact.dtype == torch.float32
    assert torch.equal(exact.model.norm.weight.bfloat16(), model.model.norm.weight)


def test_the_table_is_no_larger_than_the_source() -> None:
    for parameters, hidden in ((10**6, 64), (124 * 10**6, 768), (494 * 10**6, 896), (7 * 10**9, 4096)):
        shape = MemGPTForCausalLM.config_class(hidden_size=hidden, num_attention_heads=2)
        rows, width = memory_shape(parameters, shape)
        reads = len(shape.memory_ngrams) * shape.memory_heads
        assert parameters / 5 < reads * rows * width <= parameters
        assert width % 8 == 0


def test_pretraining_starts_from_it(llama: Path, tmp_path: Path) -> None:
    settings = config.load(ROOT / "params.yaml")
    convert(llama, tmp_path / "made")
    settings = settings.model_copy(
        update={"pretrain": settings.pretrain.model_copy(update={"init": str(tmp_path / "made")})}
    )
    tokenize._tokenizer(settings, []).save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids, starts = tokenize._encode(tokenizer, TEXTS, "train")
    assert ids[starts].tolist() == [tokenizer.eos_token_id] * len(TEXTS)
    model = pretrain._initial_model(settings, tokenizer)
    rows = torch.from_numpy(ids[:32].astype("int64"))[None]
    expected = AutoModelForCausalLM.from_pretrained(llama)(rows).logits
    assert torch.allclose(model(rows).logits[..., : expected.shape[-1]], expected, atol=1e-4)
    tagger = MemGPTForTokenClassification.from_pretrained(tmp_path / "made", num_labels=3)
    assert tagger(rows).logits.shape == (1, 32, 3)


@pytest.mark.parametrize(
    ("there", "told"),
    [
        (BertConfig(), "a bert model; convert takes llama"),
        (MixtralConfig(), "a mixture of experts (mixtral)"),
        (SmolLM3Config(pad_token_id=0), "a smollm3 model; convert takes llama"),
    ],
)
def test_a_family_without_counterpart_is_refused(there: PreTrainedConfig, told: str, tmp_path: Path) -> None:
    there.save_pretrained(tmp_path / "source")
    refused(tmp_path / "source", told, tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(quantization_config={"quant_method": "awq"}), "quantised"),
        (dict(rope_parameters=dict(rope_type="spiral", rope_theta=10.0)), "rope_type='spiral'"),
        (dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)), "partial_rotary"),
        (dict(intermediate_size=64), "mlp.down_proj.weight is [32, 48], by its config.json it should be [32, 64]"),
        (dict(num_hidden_layers=4), "its weights lack model.layers.3."),
        (dict(hidden_act="sinus"), "sinus"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict, told: str, broken: Path, tmp_path: Path) -> None:
    edit(broken, **changes)
    refused(broken, told, tmp_path)


def test_gpt2_with_other_attention_is_refused(tmp_path: Path) -> None:
    refused(write(tmp_path / "source", "gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse", tmp_path)


def test_damaged_or_pickled_weights_are_refused(broken: Path, tmp_path: Path) -> None:
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(broken, "its weights cannot be loaded", tmp_path)
    weights.write_bytes(whole[:-400] + b"\xff" * 400)  # not a number, in fp32
    refused(broken, "logits differ by nan", tmp_path)
    weights.unlink()
    torch.save({}, broken / "pytorch_model.bin")
    refused(broken, "pickles are not read", tmp_path)


def test_without_a_tokenizer_that_fits_it_is_refused(broken: Path, tmp_path: Path) -> None:
    edit(broken, vocab_size=300)
    refused(broken, "its tokenizer has an id", tmp_path)
    (broken / "tokenizer.json").unlink()
    refused(broken, "tokenizer", tmp_path)


def test_what_the_mapping_does_not_know_of_shows_in_the_logits(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def scaled(self, *arguments, **options):
        outputs = plain(self, *arguments, **options)
        outputs.logits = outputs.logits * 1.01
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    refused(llama, "logits differ by", tmp_path)


def refused(source: Path, told: str, place: Path) -> None:
    """In one line, nothing written."""
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        convert(source, place / "made")
    assert "\n" not in str(caught.value)
    assert not (place / "made").exists()


def test_the_command_writes_a_model_and_never_over_one(llama: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["convert", str(llama), str(tmp_path / "made"), "--memory-rows", "16"])
    assert done.exit_code == 0, done.output
    assert "M active parameters" in done.output
    made = MemGPTForCausalLM.from_pretrained(tmp_path / "made")
    assert (made.config.memory_rows, made.config.memory_dim) == (16, 8)
    assert lineage.read(tmp_path / "made")["parent"] == lineage.weights_digest(llama)
    again = CliRunner().invoke(cli.app, ["convert", str(llama), str(tmp_path / "made")])
    assert isinstance(again.exception, UserError)
    absent = CliRunner().invoke(cli.app, ["convert", str(tmp_path / "absent"), str(tmp_path / "other")])
    assert isinstance(absent.exception, UserError)
    assert "\n" not in str(absent.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
