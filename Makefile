# make run    make .venv, train on the embedded data, end with promoted models
# make test   make .venv, run the tests
# make up     Prefect server, worker, MLflow UI and the scheduled deployments, on loopback; once is enough
# make down   stop what make up started
# make check  lint, format and types
# make clean  remove what these made
# make lock   resolve requirements.lock anew from pyproject.toml
.PHONY: run test up down check clean lock environment

run: environment
	@.venv/bin/memgpt retrain

test: environment
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

up: environment
	@.venv/bin/python -m flows.up

down: environment
	@.venv/bin/python -m flows.up --down

check: environment
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

environment:
	@bash infra/install.sh

lock:
	@bash infra/lock.sh

# Not backups, nor models of the user's own. Only what git does not track goes: -x takes ignored files too, and git keeps
# every committed one. Patterns apart: beside one, git empties folders but leaves them.
MODELS = $(addprefix models/,tokenizer base multitask ner sentiment recommendation)
clean:
	@if [ -d .memgpt/up ] && [ -x .venv/bin/python ]; then .venv/bin/python -m flows.up --down; fi
	@find .memgpt -mindepth 1 -maxdepth 1 ! -name backups -exec rm -rf {} + 2>/dev/null; \
		git worktree prune  # git clean leaves worktrees
	@git clean -fdxq -- .venv .prefect mlflow.db mlflow.db-shm mlflow.db-wal mlartifacts mlruns dvc_plots \
		data/tables data/tokens $(MODELS) reports .dvc/cache .dvc/tmp .pytest_cache .mypy_cache .ruff_cache
	@git clean -fdxq -- '*.egg-info' '*__pycache__*'
