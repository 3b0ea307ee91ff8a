"""What training says when the device is not what it should be: too little memory, too old, or not there."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset, default_collate

from memgpt import config, training
from memgpt.errors import UserError
from memgpt.model import MemGPTConfig, MemGPTForCausalLM

PARAMS = config.load(Path(__file__).parents[1] / "params.yaml")


def test_too_little_memory_names_what_to_lower(tmp_path: Path) -> None:
    def loss(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    model = MemGPTForCausalLM(
        MemGPTConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, memory_rows=8)
    )
    data = TensorDataset(torch.zeros(4, 8, dtype=torch.long))
    for title, params, settings in (
        ("pretrain", PARAMS.pretrain, r"pretrain\.batch_size=16 or pretrain\.sequence_length=128"),
        ("finetune ner", PARAMS.finetune.ner, r"finetune\.ner\.batch_size=32 or finetune\.ner\.max_length=128"),
    ):
        with pytest.raises(UserError, match=settings):
            training.train(model, data, default_collate, params, steps=1, checkpoints=tmp_path, title=title, loss=loss)


@pytest.mark.parametrize(
    ("cuda", "visible", "told"),
    [("13.0", None, True), (None, "0", True), (None, None, False), (None, "", False), (None, "-1", False)],
)
def test_no_gpu_where_one_was_expected_is_told(
    cuda: str | None,
    visible: str | None,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    on_cpu, _ = training._device("pretrain")
    assert on_cpu
    said = capsys.readouterr().err
    assert said == ("pretrain: no GPU that torch can use; training on the CPU\n" if told else "")


@pytest.mark.parametrize(("capability", "bf16"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_without_bf16_trains_in_32_bits_and_says_so(
    capability: tuple[int, int], bf16: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert training._device("pretrain") == (False, bf16)
    said = capsys.readouterr().err
    assert ("Tesla T4 (compute capability 7.5) is too old for bf16" in said) is not bf16
    assert said.count("\n") == (0 if bf16 else 1)
