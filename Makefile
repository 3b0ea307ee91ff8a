# make run    create .venv, train on the embedded data, promote the models
# make test   create .venv, run the tests
# make up     start Prefect server, worker, MLflow UI and the scheduled deployments, on loopback; once is enough
# make down   stop what make up started
# make check  lint, format and types
# make clean  remove what these commands created
# make lock   resolve requirements.lock again from pyproject.toml
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

# Keeps backups and models of the user's own. git clean removes only untracked files, with -x also ignored ones. The
# patterns are a separate call, because git clean leaves empty folders behind if one of its paths is a pattern.
MODELS = $(addprefix models/,tokenizer base multitask ner sentiment recommendation)
clean:
	@if [ -d .memgpt/up ] && [ -x .venv/bin/python ]; then .venv/bin/python -m flows.up --down; fi
	@find .memgpt -mindepth 1 -maxdepth 1 ! -name backups -exec rm -rf {} + 2>/dev/null; \
		git worktree prune  # git clean leaves worktrees
	@git clean -fdxq -- .venv .prefect mlflow.db mlflow.db-shm mlflow.db-wal mlartifacts mlruns dvc_plots \
		data/tables data/tokens $(MODELS) reports .dvc/cache .dvc/tmp .pytest_cache .mypy_cache .ruff_cache
	@git clean -fdxq -- '*.egg-info' '*__pycache__*'
