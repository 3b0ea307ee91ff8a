"""finetune@task: a task's head on the shared core, read in both directions. Writes models/<task>."""

from pathlib import Path

from transformers import AutoTokenizer, set_seed

from memgpt import atomic, checkpoint, lineage, predict
from memgpt.config import Config
from memgpt.errors import UserError
from memgpt.tasks import TABLES, judge
from memgpt.training import Log, train

MODELS = Path("models")


def run(config: Config, task: str, log: Log | None = None) -> dict[str, float]:
    params = getattr(config.finetune, task)
    settings = params.model_dump()
    parent, tables = MODELS / params.start, TABLES / task
    module = judge(task)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    set_seed(params.seed)
    model = module.model(parent, TABLES, **settings)
    data = module.Training(TABLES, tokenizer, **settings)
    if not len(data):
        raise UserError(
            f"data.{task}.uri: no training example in {tables}; give more rows "
            "(of a reader's items the last two are held out, and learning from the others takes two)"
        )
    checkpoints = checkpoint.directory(f"finetune-{task}", settings, [parent, tables])
    train(
        model,
        data,
        data.collate,
        params,
        steps=params.epochs * -(-len(data) // params.batch_size),
        checkpoints=checkpoints,
        title=f"finetune {task}",
        log=log,
    )
    extra = module.calibrate(model, tokenizer, TABLES, params.max_length) if task == "sentiment" else {}
    with atomic.replacing(MODELS / task) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if task == "recommendation":
            module.write_index(model, tokenizer, TABLES, directory)
        rows = module.test_rows(TABLES, "validation")
        predictions = predict.load(task, directory).predict([row["input"] for row in rows])
        found = {f"validation_{name}": value for name, value in module.metrics(rows, predictions).items()}
        metrics = {name: round(value, 6) for name, value in (found | extra).items()}
        lineage.write(directory, f"finetune@{task}", [parent, tables], settings, parent, params.seed, metrics)
    checkpoint.discard(checkpoints)
    return metrics
