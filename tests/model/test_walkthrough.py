"""The usual Hugging Face walk-through of named-entity recognition, written as a user would write it."""

import random

import torch
from seqeval.metrics import f1_score
from torch.utils.data import DataLoader

from memgpt import MemGPTConfig, MemGPTForCausalLM, MemGPTForTokenClassification, MemGPTTokenizer

TAGS = ["O", "B-PER", "I-PER", "B-LOC"]
NAMES, PLACES, VERBS = ["Ada", "Ben", "Cy", "Dora"], ["Rome", "Oslo", "Lima"], ["saw", "left", "likes"]


def sentences(count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        who = [draw.choice(NAMES), "Lee"] if draw.random() < 0.5 else [draw.choice(NAMES)]
        tags = ["B-PER", "I-PER"][: len(who)]
        rows.append(([*who, draw.choice(VERBS), draw.choice(PLACES), "."], [*tags, "O", "B-LOC", "O"]))
    return rows


def test_a_plain_pytorch_loop_learns_on_a_base_directory(tmp_path) -> None:
    train, test = sentences(200, 1), sentences(40, 2)
    torch.manual_seed(0)
    tokenizer = MemGPTTokenizer.train([" ".join(words) for words, _ in train], 300, 1)
    tokenizer.save_pretrained(tmp_path)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, memory_rows=101)
    MemGPTForCausalLM(MemGPTConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)

    tokenizer = MemGPTTokenizer.from_pretrained(tmp_path)
    model = MemGPTForTokenClassification.from_pretrained(tmp_path, num_labels=len(TAGS))

    def collate(rows):
        batch = tokenizer([words for words, _ in rows], is_split_into_words=True, padding=True, return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        for row, (_, tags) in enumerate(rows):
            before = None
            for position, word in enumerate(batch.word_ids(row)):
                if word is not None and word != before:
                    labels[row, position] = TAGS.index(tags[word])
                before = word
        return {**batch, "labels": labels}

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(4):
        for batch in DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate):
            loss = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    batch = collate(test)
    with torch.no_grad():
        choice = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    kept = batch["labels"] != -100
    predicted = [[TAGS[i] for i in row[mask]] for row, mask in zip(choice, kept, strict=True)]
    assert f1_score([tags for _, tags in test], predicted) > 0.95
